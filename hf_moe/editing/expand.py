# SPDX-License-Identifier: Apache-2.0
"""`expand_experts`: more experts in a mixture of experts, made by duplicating those that it has."""

from pathlib import Path

import torch

from ..training.statistics import RoutingStatistics
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import LayerContext
from ..upcycling.methods import add_noise
from ..upcycling.output import OutputFolder
from ..upcycling.recipe import UpcycleConfig
from .edit import Edit, EditedLayer, EditReport, edit_steps, selected, write_edit
from .load import describe_statistics, load_of_layers
from .moe_checkpoint import MoeCheckpoint
from .sparse_block import has_equal_rows


def expand_experts(
    source: str | Path,
    output_dir: str | Path,
    *,
    factor: int = 2,
    keep_top_k: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    statistics: RoutingStatistics | str | Path | None = None,
    revision: str | None = None,
    verify: bool = True,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> EditReport:
    r"""
    Duplicate the experts of a mixture of experts, and their rows of the router, to train the larger model on.

    Where a token takes `factor` times as many experts too, it takes every copy of those it took before, and the copies
    share the weight: the result computes what the source computes. That is claimed, and checked, without noise, for the
    classes of transformers whose router is a softmax and for those routers of hf_moe that declare it: `soft`, `noisy_topk`
    (in evaluation), `softmax_topk` and `attention` without `use_expert_bias`, `sigmoid_topk` with `norm_topk_prob`,
    `expert_choice`. With `keep_top_k` the copies of an expert tie, and a token takes several copies of its
    best expert in place of its second best; this is how https://huggingface.co/papers/2604.19835 grows a model, with
    more copies of the experts that matter, and training has to mend it. The error is measured and reported.

    Args:
        source (`str` or `Path`): The mixture of experts, a folder or a Hub id.
        output_dir (`str` or `Path`): The folder to write.
        factor (`int`, *optional*, defaults to 2): By how much the number of experts grows.
        keep_top_k (`bool`, *optional*, defaults to `False`): Whether a token takes as many experts as before.
        noise (`float`, *optional*, defaults to 0.0): Standard deviation of the noise that is added to the copies and to
            their rows, relative to that of each tensor. The originals stay as they are.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.
        statistics (`RoutingStatistics`, `str` or `Path`, *optional*): Statistics of this model, or the file that
            `RoutingStatistics.save` wrote. Then the experts do not all get the same number of copies: each next copy goes
            to the expert with the most load per copy.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        verify (`bool`, *optional*, defaults to `True`): Whether the outputs of source and result are compared.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`EditReport`]: `details` has, per layer, the expert that each expert of the result was copied from.

    Raises:
        UpcycleError: if the source cannot be expanded, or if the result should be exact and is not.

    Example:

    ```python
    >>> from hf_moe import expand_experts

    >>> report = expand_experts("mistralai/Mixtral-8x7B-v0.1", "mixtral-16x7b", factor=2)
    ```
    """
    if factor < 2:
        raise UpcycleError(f"`factor` must be at least 2, got {factor}.")
    if not 0 <= noise < float("inf"):
        raise UpcycleError(f"`noise` must be a finite number and not negative, got {noise}.")
    output = OutputFolder(output_dir, [source], overwrite)
    moe = MoeCheckpoint(source, revision)
    moe.refuse_router_residual()
    load = load_of_layers(moe, statistics) if statistics is not None else None
    copied_from = {
        index: _copied_from(block.num_experts, factor, None if load is None else load[index])
        for index, block in moe.blocks.items()
    }
    top_k = moe.top_k * (1 if keep_top_k else factor)
    config = moe.with_experts({index: len(experts) for index, experts in copied_from.items()}, top_k)
    layers = {index: _expanded(moe, index, experts, noise, seed) for index, experts in copied_from.items()}
    edit = Edit(
        operation="expand",
        arguments={
            "factor": factor,
            "keep_top_k": keep_top_k,
            "noise": noise,
            "seed": seed,
            "statistics": describe_statistics(statistics),
        },
        details={str(index): experts for index, experts in copied_from.items()},
        config=config,
        model_class=moe.model_class,
        steps=edit_steps(moe, layers),
        inexact_because=_inexact_because(moe, copied_from, keep_top_k, noise),
        top_k=top_k,
    )
    return write_edit(moe, output, edit, verify=verify, max_shard_size=max_shard_size, progress=progress)


def _copied_from(num_experts: int, factor: int, load: torch.Tensor | None) -> list[int]:
    """The original of every expert: the originals themselves come first, then the copies."""
    experts = list(range(num_experts))
    if load is None:
        return experts * factor
    copies = torch.ones(num_experts, dtype=torch.float64)
    for _ in range((factor - 1) * num_experts):
        copies[(load / copies).argmax()] += 1
    return experts + [expert for expert in experts for _ in range(int(copies[expert]) - 1)]


def _expanded(moe: MoeCheckpoint, index: int, experts: list[int], noise: float, seed: int) -> EditedLayer:
    block = moe.blocks[index]
    layer = selected(moe, block, experts)
    if not noise:
        return layer
    context = LayerContext(UpcycleConfig(seed=seed), index, len(experts))

    def disturb(tensor: torch.Tensor, expert_index: int, purpose: str, std: torch.Tensor) -> torch.Tensor:
        return add_noise(tensor, noise * std, context.generator(expert_index, f"expand/{purpose}"))

    def expert(expert_index: int):
        weights = layer.expert(expert_index)
        if expert_index < block.num_experts:
            return weights
        return weights.map(lambda name, tensor: disturb(tensor, expert_index, name, tensor.float().std(correction=0)))

    def rows(name: str, value: torch.Tensor) -> torch.Tensor:
        new = layer.rows(name, value)
        std = value.float().std(correction=0)
        for expert_index in range(block.num_experts, len(experts)):
            new[expert_index] = disturb(new[expert_index], expert_index, f"router/{name}", std)
        return new

    return EditedLayer(len(experts), expert, rows)


def _inexact_because(
    moe: MoeCheckpoint, copied_from: dict[int, list[int]], keep_top_k: bool, noise: float
) -> str | None:
    if noise:
        return f"noise is added to the copies (noise={noise})"
    follows_top_k = moe.router_class is None or not moe.router_class.has_variable_top_k
    if keep_top_k and follows_top_k and not (moe.top_k == 1 and moe.weight_sum is not None):
        return "a token takes as many experts as before, several of which may be copies of one (keep_top_k)"
    if any(len({experts.count(expert) for expert in experts}) > 1 for experts in copied_from.values()):
        return "the experts have different numbers of copies (statistics)"
    if (reason := moe.copies_differ_because()) is not None:
        return reason
    if tied := [i for i, block in moe.blocks.items() if has_equal_rows(moe.router_weight(block))]:
        return f"rows of the router are equal in layers {tied}, so that chance decides between experts"
    return None
