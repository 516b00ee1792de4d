# SPDX-License-Identifier: Apache-2.0
"""
The proof: the written checkpoint is run beside the dense one, and the outputs are compared.

`measure_parity` runs the real model classes with weights that are read when a module needs them and dropped after, the
experts one by one. What stays in memory are the inputs and outputs of the compared blocks, a few hundred tokens.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from ..training.statistics import LayerRouting, RoutingStatistics
from .calibration import read_text
from .checkpoint import Checkpoint, load_tokenizer
from .convert import in_memory_names
from .errors import UpcycleError
from .feed_forward import LayerSizes
from .layouts import FusedExpert, FusedLayout, PerExpertLayout
from .plan import UpcyclePlan
from .recipe import UpcycleConfig
from .target import Target
from .targets import find_family


logger = logging.get_logger(__name__)
FLOAT32_BOUND = 1e-5
NUM_TOKENS = 256
# Were the experts equally popular, one in ten million would get none of so many tokens by chance.
TOKENS_PER_EXPERT = 16
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


class Sample(NamedTuple):
    """What both models are given: keyword arguments of `forward`, the number of tokens in them, and whether they are text."""

    inputs: dict[str, torch.Tensor]
    num_tokens: int
    is_text: bool


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints that are compared, the class that computes it, and the path to its layers."""

    model_class: type[PreTrainedModel]
    checkpoint: Checkpoint
    layers: str = "layers"


def draw_sample(dense: Checkpoint, recipe: UpcycleConfig) -> Sample:
    """
    What [`sample_of`] gives, of the recipe's `calibration_text` or our own, with enough tokens to show which experts get
    none.
    """
    needed = max(NUM_TOKENS, TOKENS_PER_EXPERT * max(recipe.expert_counts) // recipe.num_experts_per_tok)
    return sample_of(dense, needed, recipe.calibration_files)


def sample_of(dense: Checkpoint, needed: int = NUM_TOKENS, files: Sequence[str] = ()) -> Sample:
    """
    A text in the model's own tokens; random ones with a warning if it has no tokenizer that works; random images for a
    model that sees.

    Args:
        needed (`int`, *optional*, defaults to 256): Number of tokens at least. They are more where the sliding window is at
            most 1024, to be longer than it.
        files (`Sequence[str]`, *optional*): Files with the text, each of which gives an equal share. Ours if there are none.
    """
    generator = torch.Generator().manual_seed(0)
    if hasattr(dense.config, "image_size"):
        return _random_images(dense.config, needed, generator)
    window = getattr(dense.config, "sliding_window", None) or 0
    length = max(needed, window + 32 if window <= 4 * NUM_TOKENS else 0)
    length = min(length, dense.config.max_position_embeddings)
    rows = -(-needed // length)
    tokenizer = load_tokenizer(dense)
    if tokenizer is not None:
        texts = [read_text(Path(file)) for file in files] or [TEXT]
        share = -(-rows * length // len(texts))
        ids = [token for text in texts for token in _repeated(tokenizer(text, verbose=False)["input_ids"], share)]
        return Sample({"input_ids": torch.tensor(ids[: rows * length]).view(rows, length)}, rows * length, True)
    logger.warning(f"{dense.source} has no tokenizer that loads: random tokens are compared.")
    ids = torch.randint(dense.config.vocab_size, (rows, length), generator=generator)
    return Sample({"input_ids": ids}, rows * length, False)


def _repeated(ids: list[int], length: int) -> list[int]:
    return (ids * (length // len(ids) + 1))[:length]


def _random_images(config: PreTrainedConfig, num_tokens: int, generator: torch.Generator) -> Sample:
    def pair(size: Any) -> tuple[int, int]:
        return tuple(size) if isinstance(size, list | tuple) else (size, size)

    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    tokens_per_image = (height // patch_height) * (width // patch_width) + 1
    count = -(-num_tokens // tokens_per_image)
    images = torch.randn(count, config.num_channels, height, width, generator=generator)
    return Sample({"pixel_values": images}, count * tokens_per_image, False)


def measure_parity(
    dense: Side,
    result: Side,
    plan: UpcyclePlan,
    sample: Sample,
    *,
    whole_model: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Compare the result with the dense model on one text, in float32 and in the type of the weights.

    Each sparse block gets what the dense feed-forward got. If the method is exact, whatever copy serves a token gives the
    same, so the tokens are then dealt out to the copies in turn: every expert is looked at, not only those that the
    router happens to choose. The pass of the whole model is routed by the router.

    Args:
        whole_model (`bool`, *optional*, defaults to `True`): Whether to compare the model's outputs too.

    Returns:
        `dict`: `num_tokens`, `text` (False where random tokens or images had to serve), `beyond_window` (whether the tokens reach
        beyond the sliding window; None without one) and per data type `layers` (largest difference of each block's
        output divided by its largest value) and, for the whole model, `max_relative_error` of the logits,
        `top1_agreement` and `kl_divergence` (mean over tokens, in nats). `routing` says which experts the routers chose
        in float32, see [`~hf_moe.training.statistics.RoutingStatistics`].
    """
    dense_config = dense.checkpoint.config
    parity = describe_sample(sample, dense_config)
    num_layers, num_blocks = dense_config.num_hidden_layers, len(plan.experts_in_layer)
    for dtype in dict.fromkeys((torch.float32, dense_config.dtype)):
        name = str(dtype).removeprefix("torch.")
        with tqdm(
            total=num_layers + (num_layers if whole_model else num_blocks),
            desc=f"Verifying in {name}",
            unit=" layers",
            disable=None if progress else True,
        ) as bar:
            parity[name], routing = compare(dense, result, plan, sample, dtype, whole_model, bar)
        if dtype == torch.float32:
            parity["routing"] = routing.to_dict()
    return parity


def describe_sample(sample: Sample, config: PreTrainedConfig) -> dict[str, Any]:
    """What a reader must know of the tokens that were compared."""
    window = getattr(config, "sliding_window", None)
    beyond_window = sample.inputs["input_ids"].shape[1] > window if window else None
    return {"num_tokens": sample.num_tokens, "text": sample.is_text, "beyond_window": beyond_window}


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


def compare(
    dense: Side,
    result: Side,
    plan: UpcyclePlan,
    sample: Sample,
    dtype: torch.dtype,
    whole_model: bool,
    bar: tqdm,
    forced_experts: list[int] | None = None,
) -> tuple[dict[str, Any], RoutingStatistics]:
    """
    What [`measure_parity`] reports for one data type, and which experts the routers chose.

    Args:
        forced_experts (`list[int]`, *optional*): Every token goes to one of these experts, dealt out in turn, with weight 1.
    """
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.inputs.items()}
    dense_model = streamed_model(dense, dense.checkpoint.config, dtype)
    names = find_family(dense.checkpoint.config).feed_forward
    captured: dict[int, list[torch.Tensor]] = {}
    for index, layer in enumerate(_layers(dense_model, dense)):
        if index in plan.experts_in_layer:
            captured[index] = _capture(layer.get_submodule(names.up), layer.get_submodule(names.down))
        _advance_with(layer, bar)
    with torch.no_grad():
        expected = output_of(dense_model(**inputs))
        del dense_model

        model = streamed_model(result, plan.config, dtype, plan.target)
        layers = _layers(model, result)
        errors: dict[str, float] = {}
        for index in plan.experts_in_layer:
            blocks = [layers[index].get_submodule(name) for name in _sparse_modules(plan.target, plan.sizes)]
            block_input, block_output = captured.pop(index)
            blocks[0].experts.num_counted = sample.num_tokens
            if plan.exact:
                blocks[0].experts.experts_per_copy = plan.sizes.experts_per_copy
                blocks[0].experts.deal_from = sample.num_tokens if whole_model else 0
            blocks[0].experts.forced_experts = forced_experts
            if whole_model:
                _compare_on_the_way(blocks, block_input, block_output, errors, index)
            else:
                errors[str(index)] = _relative_error(sum(block(block_input) for block in blocks), block_output)
                bar.update()
        measured: dict[str, Any] = {"layers": errors}
        if whole_model:
            for layer in layers:
                _advance_with(layer, bar)
            measured |= compare_outputs(output_of(model(**inputs)), expected)
    routing = {
        name.removesuffix(".experts"): LayerRouting(module.counts, sample.num_tokens)
        for name, module in model.named_modules()
        if hasattr(module, "counts")
    }
    return measured, RoutingStatistics(routing)


def _capture(first: torch.nn.Module, last: torch.nn.Module) -> list[torch.Tensor]:
    """A list that will hold the input of a feed-forward's first module and the output of its last one."""
    captured: list[torch.Tensor] = []

    def capture_input(module, args) -> None:
        captured.append(args[0])

    def capture_output(module, args, output) -> None:
        captured.append(output)

    first.register_forward_pre_hook(capture_input)
    last.register_forward_hook(capture_output)
    return captured


def _advance_with(layer: torch.nn.Module, bar: tqdm) -> None:
    def advance(module, args, output) -> None:
        bar.update()  # must not be returned: it would take the place of the layer's output

    layer.register_forward_hook(advance)


def _sparse_modules(target: Target, sizes: LayerSizes) -> list[str]:
    """The modules of a layer whose outputs add up to that of the dense feed-forward: the block, and what stands beside it."""
    shared = target.shared_expert
    if shared is None or shared.size(sizes) is None or shared.names.up.startswith(f"{target.block}."):
        return [target.block]
    return [target.block, shared.names.up.rpartition(".")[0]]


def _compare_on_the_way(
    blocks: list[torch.nn.Module],
    block_input: torch.Tensor,
    expected: torch.Tensor,
    errors: dict[str, float],
    index: int,
) -> None:
    """Let the whole model's pass carry the blocks' own comparison along as more sequences: each expert is read once."""
    count, total = len(block_input), torch.zeros_like(expected)

    def add_sequences(module, args):
        return (torch.cat([args[0], block_input]),)

    def take_sequences(module, args, output):
        total.add_(output[count:])
        errors[str(index)] = _relative_error(total, expected)  # right once the last block has added its part
        return output[:count]

    for block in blocks:
        block.register_forward_pre_hook(add_sequences)
        block.register_forward_hook(take_sequences)


def compare_outputs(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Largest relative error, share of the tokens with the same best output, and mean KL divergence in nats."""
    common = min(actual.shape[-1], expected.shape[-1])  # composed models may have different vocabularies
    actual, expected = actual[..., :common].float(), expected[..., :common].float()
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


def output_of(outputs: Any) -> torch.Tensor:
    """The logits, or the last hidden state of a model without a head."""
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def _layers(model: PreTrainedModel, side: Side) -> torch.nn.ModuleList:
    return model.base_model.get_submodule(side.layers)


class _Tensors(Mapping):
    """The tensors of a checkpoint by their names in memory, in one data type or that of the model, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, model: PreTrainedModel):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        names = in_memory_names(list(checkpoint), model)
        self.name_on_disk = {in_memory: on_disk for on_disk, in_memory in names.items()}
        tied = model.all_tied_weights_keys
        self.name_on_disk |= {name: self.name_on_disk[other] for name, other in tied.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(self.name_on_disk[name]).to(self.dtypes[name])

    def on_disk(self, name: str, row: int | None) -> torch.Tensor:
        """An expert's tensor, or one row of it, by its name on disk."""
        return (self._read(name) if row is None else self.checkpoint.read_row(name, row)).to(self.dtype)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name, check_finite=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.name_on_disk)

    def __len__(self) -> int:
        return len(self.name_on_disk)


def streamed_model(
    side: Side, config: PreTrainedConfig, dtype: torch.dtype, target: Target | None = None
) -> PreTrainedModel:
    """
    A model without weights of its own: each module reads its weights from the checkpoint for the time of its forward.

    Args:
        target (`Target`, *optional*): What the model is, if it is a mixture of experts; its experts are read one by one.
    """
    config = copy.deepcopy(config)
    config.chunk_size_feed_forward = 0  # each feed-forward is to run once
    if target is not None:
        config._experts_implementation = "hf_moe_streamed"
    with init_empty_weights(include_buffers=False):
        model = side.model_class._from_config(config, dtype=dtype)
    model.eval()
    tensors = _Tensors(side.checkpoint, dtype, model)
    if target is not None:
        for name, module in model.named_modules():
            if name.endswith(f"{target.block}.experts"):
                module.read_expert = _expert_reader(tensors, target.layout, name, module)
                module._parameters.clear()
                module.num_counted, module.deal_from, module.forced_experts = 0, None, None
    for name, buffer in model.named_buffers():
        if name in tensors.name_on_disk:  # a selection bias, say; hooks bring parameters only
            buffer.copy_(tensors[name])
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=tensors)
    return model


def _expert_reader(
    tensors: _Tensors, layout: FusedLayout | PerExpertLayout, name: str, experts: torch.nn.Module
) -> Callable[[int], FusedExpert]:
    layer = name.removesuffix("experts").rpartition(".")[0].rpartition(".")[0] + "."
    return lambda expert_index: layout.read(tensors.on_disk, layer, expert_index, experts.has_gate, experts.has_bias)


def _streamed_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The arithmetic of transformers' grouped_mm, with the weights of one expert in memory at a time.

    The choices for the first `self.num_counted` tokens are counted. From token `self.deal_from` on, tokens are then dealt
    out to the copies in turn instead of being routed. With `self.forced_experts` each token goes to one of them alone, in
    turn, with weight 1.
    """
    self.counts = torch.bincount(top_k_index[: self.num_counted].reshape(-1), minlength=self.num_experts)
    if self.forced_experts is not None:
        turns = torch.arange(len(top_k_index)) % len(self.forced_experts)
        top_k_index = torch.tensor(self.forced_experts)[turns, None]
        top_k_weights = torch.ones_like(top_k_weights[:, :1])
    if self.deal_from is not None:
        size = self.experts_per_copy
        dealt_rows = top_k_index[self.deal_from :]
        copies = torch.arange(dealt_rows.numel() // size) % (self.num_experts // size)
        dealt = copies[:, None] * size + torch.arange(size)
        top_k_index = torch.cat([top_k_index[: self.deal_from], dealt.reshape(dealt_rows.shape)])
    slots = torch.empty(*top_k_index.shape, hidden_states.shape[-1], dtype=hidden_states.dtype)
    for expert_index in top_k_index.unique().tolist():
        expert = self.read_expert(expert_index)
        token, slot = torch.where(top_k_index == expert_index)
        # As grouped_mm does, the product is rounded before the bias is added.
        hidden = F.linear(hidden_states[token], expert.up_proj)
        hidden = hidden if expert.up_bias is None else hidden + expert.up_bias
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        output = F.linear(hidden, expert.down_proj)
        slots[token, slot] = output if expert.down_bias is None else output + expert.down_bias
    return (slots * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("hf_moe_streamed", _streamed_experts_forward)
