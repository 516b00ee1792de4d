# SPDX-License-Identifier: Apache-2.0
"""`prune_experts`: fewer experts in a mixture of experts, the least used ones or chosen ones gone."""

from pathlib import Path

import torch

from ..training.statistics import RoutingStatistics
from ..upcycling.errors import UpcycleError
from ..upcycling.output import OutputFolder
from .edit import Edit, EditReport, edit_steps, selected, write_edit
from .load import describe_statistics, load_of_layers
from .moe_checkpoint import MoeCheckpoint


def prune_experts(
    source: str | Path,
    output_dir: str | Path,
    *,
    keep: int | None = None,
    statistics: RoutingStatistics | str | Path | None = None,
    drop: list[int] | None = None,
    revision: str | None = None,
    verify: bool = True,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> EditReport:
    r"""
    Remove experts of a mixture of experts, with their rows of the router.

    Those that stay keep their order and their weights; shared experts and everything else stay as they are. The result
    does not compute what the source computes: tokens that took a removed expert take the next best, and the weights are
    shared out among fewer. The error is measured and reported.

    Args:
        source (`str` or `Path`): The mixture of experts, a folder or a Hub id.
        output_dir (`str` or `Path`): The folder to write.
        keep (`int`, *optional*): How many experts stay in every layer: those with the largest load, each layer for itself.
        statistics (`RoutingStatistics`, `str` or `Path`, *optional*): The load, for `keep`: statistics of this model, or the
            file that `RoutingStatistics.save` wrote.
        drop (`list[int]`, *optional*): In place of `keep`: indices of experts to remove from every layer.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        verify (`bool`, *optional*, defaults to `True`): Whether the outputs of source and result are compared.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`EditReport`]: `details` has, per layer, the indices of the experts that stay.

    Raises:
        UpcycleError: if the source cannot be pruned so, or if the statistics are of another model.

    Example:

    ```python
    >>> from hf_moe import prune_experts

    >>> report = prune_experts("smollm2-moe", "smollm2-moe-3", keep=3, statistics="statistics.json")
    ```
    """
    if (keep is None) == (drop is None):
        raise UpcycleError(
            f"Say either how many experts to `keep` or which to `drop`, got keep={keep} and drop={drop}."
        )
    if (keep is None) != (statistics is None):
        raise UpcycleError(
            "`keep` needs `statistics`, which say how much each expert is used, and `drop` has no use for them. Record them "
            "with a RoutingRecorder or `hf-moe inspect --output`."
        )
    output = OutputFolder(output_dir, [source], overwrite)
    moe = MoeCheckpoint(source, revision)
    moe.refuse_router_residual()
    if keep is None or statistics is None:
        kept = _without(moe, drop or [])
    else:
        kept = _most_loaded(moe, keep, load_of_layers(moe, statistics))
    counts = {index: len(experts) for index, experts in kept.items()}
    top_k = moe.top_k_among(counts)
    config = moe.with_experts(counts, top_k)
    layers = {index: selected(moe, moe.blocks[index], experts) for index, experts in kept.items()}
    edit = Edit(
        operation="prune",
        arguments={"keep": keep, "statistics": describe_statistics(statistics), "drop": drop},
        details={str(index): experts for index, experts in kept.items()},
        config=config,
        model_class=moe.model_class,
        steps=edit_steps(moe, layers),
        inexact_because="tokens that took a removed expert take another one",
        top_k=top_k,
    )
    return write_edit(moe, output, edit, verify=verify, max_shard_size=max_shard_size, progress=progress)


def _without(moe: MoeCheckpoint, drop: list[int]) -> dict[int, list[int]]:
    if not drop or len(set(drop)) < len(drop):
        raise UpcycleError(f"`drop` must name at least one expert, each once, got {drop}.")
    for index, block in moe.blocks.items():
        if outside := [expert for expert in drop if not 0 <= expert < block.num_experts]:
            raise UpcycleError(f"`drop` names {outside}, but layer {index} has experts 0 to {block.num_experts - 1}.")
    return {
        index: [expert for expert in range(block.num_experts) if expert not in drop]
        for index, block in moe.blocks.items()
    }


def _most_loaded(moe: MoeCheckpoint, keep: int, load: dict[int, torch.Tensor]) -> dict[int, list[int]]:
    fewest = min(block.num_experts for block in moe.blocks.values())
    if not 1 <= keep < fewest:
        raise UpcycleError(
            f"`keep` must lie between 1 and {fewest - 1}, one less than the experts there are, got {keep}."
        )
    return {
        index: sorted(shares.argsort(descending=True, stable=True)[:keep].tolist()) for index, shares in load.items()
    }
