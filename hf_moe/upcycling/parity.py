# SPDX-License-Identifier: Apache-2.0
"""
The proof: the written checkpoint is run beside the dense one, and the outputs are compared.

`measure_parity` runs the real model classes with weights that are read when a module needs them and dropped after, the
experts one by one. What stays in memory are the inputs and outputs of the compared blocks, a few hundred tokens.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from ..models.routing_context import RoutingContext
from ..models.sparse_block import MoeSparseBlock
from ..training.recorder import RoutingRecorder
from ..training.statistics import LayerRouting, RoutingStatistics
from .errors import UpcycleError
from .feed_forward import LayerSizes
from .plan import UpcyclePlan
from .sample import Sample, describe_sample
from .streaming import Side, output_of, streamed_model
from .target import Target
from .targets import find_family


FLOAT32_BOUND = 1e-5


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
        `dict`: `num_tokens`, `text` (False where random tokens or images had to serve), `in_each_of` (`"2 domains"` where the
        tokens come once for each of them), `beyond_window` (whether the tokens reach beyond the sliding window; None without
        one) and per data type `layers` (largest difference of each block's
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
    inputs = sample.as_type(dtype)
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
        apart = _routes_apart(layers[next(iter(plan.experts_in_layer))].get_submodule(plan.target.block))
        errors: dict[str, float] = {}
        for index in plan.experts_in_layer:
            blocks = [layers[index].get_submodule(name) for name in _sparse_modules(plan.target, plan.sizes)]
            block_input, block_output = captured.pop(index)
            blocks[0].experts.num_counted = sample.num_tokens
            if plan.exact:
                blocks[0].experts.experts_per_copy = plan.sizes.experts_per_copy
                blocks[0].experts.deal_from = sample.num_tokens if whole_model and not apart else 0
            blocks[0].experts.forced_experts = forced_experts
            if whole_model and not apart:
                _compare_on_the_way(blocks, block_input, block_output, errors, index)
            else:
                known = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
                blocks[0].routing = RoutingContext(**known, **sample.routing) if apart else None
                errors[str(index)] = _relative_error(sum(block(block_input) for block in blocks), block_output)
                blocks[0].experts.deal_from = None
                bar.update(0 if whole_model else 1)
        measured: dict[str, Any] = {"layers": errors}
        if whole_model:
            for layer in layers:
                _advance_with(layer, bar)
            with RoutingRecorder(model) as recorder:
                outputs = output_of(model(**inputs, **sample.routing))
            measured |= compare_outputs(outputs, expected)
            if apart:
                return measured, _by_block(recorder.statistics())
    routing = {
        name.removesuffix(".experts"): LayerRouting(module.counts, sample.num_tokens)
        for name, module in model.named_modules()
        if hasattr(module, "counts")
    }
    return measured, RoutingStatistics(routing)


def _routes_apart(block: torch.nn.Module) -> bool:
    """Whether what the experts of a block get is not the block's own tokens, one after the other."""
    return isinstance(block, MoeSparseBlock) and (block.has_empty_slots or block.weighs_input or bool(block.needs))


def _by_block(statistics: RoutingStatistics) -> RoutingStatistics:
    return RoutingStatistics({name.removesuffix(".gate"): layer for name, layer in statistics.layers.items()})


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


def _layers(model: PreTrainedModel, side: Side) -> torch.nn.ModuleList:
    return model.base_model.get_submodule(side.layers)
