# SPDX-License-Identifier: Apache-2.0
"""
The proof: the written checkpoint is run beside the dense one, and the outputs are compared.

`measure_parity` runs the real model classes with weights that are read when a module needs them and dropped after, the
experts one by one. What stays in memory are the inputs and outputs of the compared blocks, a few hundred tokens.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from huggingface_hub.utils import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .checkpoint import Checkpoint
from .layouts import FusedLayout, PerExpertLayout
from .plan import UpcyclePlan
from .recipe import UpcycleConfig, UpcycleError


logger = logging.get_logger(__name__)
FLOAT32_BOUND = 1e-5
NUM_TOKENS = 256
TEXT = """The harbour master counted the boats twice before he wrote 37 into the log, because the fog had already hidden
the far pier. "If the tide turns at 6:15," he said, "we shall have four hours and ten minutes." Nobody answered him.

def moving_average(values: list[float], width: int) -> list[float]:
    if width < 1 or width > len(values):
        raise ValueError(f"width must lie between 1 and {len(values)}, got {width}")
    total = sum(values[:width])
    averages = [total / width]
    for leaving, entering in zip(values, values[width:]):
        total += entering - leaving
        averages.append(total / width)
    return averages

Le train de nuit part à 22 h 40 ; il arrive à Lyon vers sept heures. Das Wetter bleibt bis Freitag wechselhaft.
Let f be continuous on [0, 1] with f(0) < 0 < f(1). Then f(x) = 0 for some x, since the supremum of the set where f is
negative belongs neither to that set nor to its complement's interior. See RFC 9110, section 15.5.5: 404 Not Found.
The licensee may copy, modify and distribute the work, provided that this notice is kept and that changes are marked.
"""


class Tokens(NamedTuple):
    """`(1, S)` token ids, and whether they are text."""

    ids: torch.Tensor
    is_text: bool


@dataclass(frozen=True)
class Result:
    """The checkpoint under test."""

    model_class: type[PreTrainedModel]
    checkpoint: Checkpoint
    plan: UpcyclePlan


def sample_tokens(dense: Checkpoint, recipe: UpcycleConfig) -> Tokens:
    """
    A text in the dense model's own tokens, or random ones with a warning if it has no tokenizer that works.

    They are enough to reach every expert, and longer than the sliding window where that is at most 1024.
    """
    window = getattr(dense.config, "sliding_window", None) or 0
    length = max(
        NUM_TOKENS,
        window + 32 if window <= 4 * NUM_TOKENS else 0,
        recipe.num_experts // recipe.num_experts_per_tok + 1,
    )
    length = min(length, dense.config.max_position_embeddings)
    if any(path.name.startswith("tokenizer") for path in dense.auxiliary_files()):
        try:
            ids = AutoTokenizer.from_pretrained(dense.folder, trust_remote_code=False)(TEXT)["input_ids"]
            return Tokens(torch.tensor([(ids * (length // len(ids) + 1))[:length]]), True)
        except (ImportError, OSError, TypeError, ValueError, KeyError) as error:
            logger.warning(
                f"The tokenizer of {dense.source} does not load; random tokens are compared instead. ({error})"
            )
    else:
        logger.warning(f"{dense.source} has no tokenizer: none is copied, and random tokens are compared.")
    generator = torch.Generator().manual_seed(0)
    return Tokens(torch.randint(dense.config.vocab_size, (1, length), generator=generator), False)


def measure_parity(
    dense_class: type[PreTrainedModel],
    dense: Checkpoint,
    result: Result,
    tokens: Tokens,
    *,
    whole_model: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Compare the result with the dense model on one text, in float32 and in the type of the weights.

    Each sparse block gets what the dense feed-forward got. If the method is exact, whatever expert serves a token gives
    the same, so the tokens are then dealt out to the experts in turn: every expert is looked at, not only those that the
    router happens to choose. The pass of the whole model is routed by the router.

    Args:
        whole_model (`bool`, *optional*, defaults to `True`): Whether to compare the model's outputs too.

    Returns:
        `dict`: `num_tokens`, `text` (False where random tokens had to serve), `beyond_window` (whether the tokens reach
        beyond the sliding window; None without one) and per data type `layers` (largest difference of each block's
        output divided by its largest value) and, for the whole model, `max_relative_error` of the logits,
        `top1_agreement` and `kl_divergence` (mean over tokens, in nats).
    """
    window = getattr(dense.config, "sliding_window", None)
    parity: dict[str, Any] = {
        "num_tokens": tokens.ids.shape[1],
        "text": tokens.is_text,
        "beyond_window": tokens.ids.shape[1] > window if window else None,
    }
    num_layers, num_blocks = dense.config.num_hidden_layers, len(result.plan.sparse_layers)
    for dtype in dict.fromkeys((torch.float32, dense.config.dtype)):
        name = str(dtype).removeprefix("torch.")
        with tqdm(
            total=num_layers + (num_layers if whole_model else num_blocks),
            desc=f"Verifying in {name}",
            unit=" layers",
            disable=None if progress else True,
        ) as bar:
            parity[name] = _compare(dense_class, dense, result, tokens.ids, dtype, whole_model, bar)
    return parity


def summarize(parity: dict[str, Any]) -> float:
    """The largest relative error in float32, of the layers and of the whole model if it was compared."""
    measured = parity["float32"]
    return max([*measured["layers"].values(), measured.get("max_relative_error", 0.0)])


def check_parity(parity: dict[str, Any], folder: Path) -> None:
    """
    Fail if a conversion that should be exact is not.

    Raises:
        UpcycleError: if the largest relative error in float32 is above 1e-5.
    """
    if summarize(parity) > FLOAT32_BOUND:
        raise UpcycleError(
            f"The result does not compute what the dense model computes: the largest relative difference is "
            f"{summarize(parity):.1e}, where an exact method allows {FLOAT32_BOUND:.0e}. The files are left in {folder} for "
            "inspection; delete that folder to try again. Please report this with the configuration of the source."
        )


def _compare(
    dense_class: type[PreTrainedModel],
    dense: Checkpoint,
    result: Result,
    ids: torch.Tensor,
    dtype: torch.dtype,
    whole_model: bool,
    bar: tqdm,
) -> dict[str, Any]:
    dense_model = _streamed_model(dense_class, dense.config, _Tensors(dense, dtype), None)
    captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(_layers(dense_model)):
        if index in result.plan.sparse_layers:
            _capture(layer.mlp, captured, index)
        _advance_with(layer, bar)
    with torch.no_grad():
        expected = _output(dense_model(ids))
        del dense_model

        layout = result.plan.target.layout
        tensors = _Tensors(result.checkpoint, dtype, layout.block)
        model = _streamed_model(result.model_class, result.plan.config, tensors, layout)
        layers = _layers(model)
        errors: dict[str, float] = {}
        for index in result.plan.sparse_layers:
            block, (block_input, block_output) = layers[index].mlp, captured.pop(index)
            if result.plan.exact:
                block.experts.deal_from = ids.shape[1] if whole_model else 0
            if whole_model:
                _compare_on_the_way(block, block_input, block_output, errors, index)
            else:
                errors[str(index)] = _relative_error(block(block_input), block_output)
                bar.update()
        measured: dict[str, Any] = {"layers": errors}
        if whole_model:
            for layer in layers:
                _advance_with(layer, bar)
            measured |= _compare_outputs(_output(model(ids)), expected)
    return measured


def _capture(module: torch.nn.Module, captured: dict[int, tuple[torch.Tensor, torch.Tensor]], index: int) -> None:
    def capture(module, args, output) -> None:
        captured[index] = (args[0], output)

    module.register_forward_hook(capture)


def _advance_with(layer: torch.nn.Module, bar: tqdm) -> None:
    def advance(module, args, output) -> None:
        bar.update()  # must not be returned: it would take the place of the layer's output

    layer.register_forward_hook(advance)


def _compare_on_the_way(
    block: torch.nn.Module, block_input: torch.Tensor, expected: torch.Tensor, errors: dict[str, float], index: int
) -> None:
    """Let the whole model's pass carry the block's own comparison along as a second sequence: each expert is read once."""

    def add_sequence(module, args):
        return (torch.cat([args[0], block_input]),)

    def take_sequence(module, args, output):
        errors[str(index)] = _relative_error(output[1:], expected)
        return output[:1]

    block.register_forward_pre_hook(add_sequence)
    block.register_forward_hook(take_sequence)


def _compare_outputs(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    actual, expected = actual.float(), expected.float()
    divergence = F.kl_div(actual.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True)
    return {
        "max_relative_error": _relative_error(actual, expected),
        "top1_agreement": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "kl_divergence": max(divergence.sum(-1).mean().item(), 0.0),  # rounding can make it negative
    }


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference divided by the largest expected value; infinite where either is not finite."""
    difference = (actual.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    if difference == 0:
        return 0.0
    error = difference / scale if scale else math.inf
    return error if math.isfinite(error) else math.inf


def _output(outputs: Any) -> torch.Tensor:
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.base_model.layers


class _Tensors(Mapping):
    """
    The tensors of a checkpoint by their names in memory, in one data type, read when asked for.

    `tied` names give the tensor they are tied to; `block` is what the sparse block, `mlp` in memory, is called on disk.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, block: str = "mlp"):
        self.checkpoint, self.dtype, self.block = checkpoint, dtype, block
        self.tied: Mapping[str, str] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        name = self.tied.get(name, name).replace(".mlp.", f".{self.block}.")
        return self.checkpoint.read(name, check_finite=False).to(self.dtype)

    def rows(self, name: str, index: int | None) -> torch.Tensor:
        return self.checkpoint.read_row(name, index).to(self.dtype) if index is not None else self[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.checkpoint, *self.tied])

    def __len__(self) -> int:
        return len(list(iter(self)))


def _streamed_model(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: _Tensors,
    layout: FusedLayout | PerExpertLayout | None,
) -> PreTrainedModel:
    """A model without weights of its own: each module reads its weights from `tensors` for the time of its forward."""
    config = copy.deepcopy(config)
    if layout is not None:
        config._experts_implementation = "hf_moe_streamed"
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=tensors.dtype)
    model.eval()
    if config.tie_word_embeddings:
        tensors.tied = model.all_tied_weights_keys
    for name, module in model.named_modules():
        if layout is not None and name.endswith("mlp.experts"):
            module.read_expert = _expert_reader(tensors, layout, name.removesuffix("mlp.experts"))
            module._parameters.clear()
            module.deal_from = None
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=tensors)
    return model


def _expert_reader(
    tensors: _Tensors, layout: FusedLayout | PerExpertLayout, layer: str
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    return lambda expert_index: layout.read(tensors.rows, layer, expert_index)


def _streamed_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The arithmetic of transformers' grouped_mm, with the weights of one expert in memory at a time.

    From row `self.deal_from` on, tokens are dealt out to the experts in turn instead of being routed.
    """
    if self.deal_from is not None:
        dealt = (
            torch.arange(top_k_index[self.deal_from :].numel()).reshape(-1, top_k_index.shape[1]) % self.num_experts
        )
        top_k_index = torch.cat([top_k_index[: self.deal_from], dealt])
    slots = torch.empty(*top_k_index.shape, hidden_states.shape[-1], dtype=hidden_states.dtype)
    for expert_index in top_k_index.unique().tolist():
        gate_up_proj, down_proj = self.read_expert(expert_index)
        token, slot = torch.where(top_k_index == expert_index)
        hidden = self._apply_gate(F.linear(hidden_states[token], gate_up_proj))
        slots[token, slot] = F.linear(hidden, down_proj)
    return (slots * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("hf_moe_streamed", _streamed_experts_forward)
