# SPDX-License-Identifier: Apache-2.0
"""
`merge_experts`: fewer experts in a mixture of experts, each the mean of several that are alike.

`similarity_of` says how alike the experts of a layer are, `group_similar` decides which go together.
"""

from pathlib import Path

import torch

from ..training.statistics import RoutingStatistics
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward
from ..upcycling.output import OutputFolder
from .edit import Edit, EditedLayer, EditReport, edit_steps, write_edit
from .load import describe_statistics, load_of_layers
from .moe_checkpoint import MoeCheckpoint
from .sparse_block import SparseBlock, has_equal_rows


SIMILARITIES = ("weights", "router")
VALUES_AT_ONCE = 2**25  # 256 MiB in float64
ROWS_DECIDE = 1e-6  # far above the rounding of a cosine, far below what tells experts apart


def merge_experts(
    source: str | Path,
    output_dir: str | Path,
    *,
    num_experts: int,
    num_experts_per_tok: int | None = None,
    similarity: str = "weights",
    statistics: RoutingStatistics | str | Path | None = None,
    revision: str | None = None,
    verify: bool = True,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> EditReport:
    r"""
    Merge the most similar experts of every layer until `num_experts` are left.

    The expert of a group is the mean of its members, and so is its row of the router; with statistics the mean is
    weighted by the members' load. The share of a group in the softmax is the sum of its members' shares; the weighted
    mean of the rows is the first-order approximation of the logarithm of that sum, up to a constant for the size of the
    group, for which a router without bias has no place.

    The result computes what the source computes where every group has m members that are equal, rows included, and a
    token takes 1 / m of the experts that it took: merging undoes [`expand_experts`]. That is claimed, and checked, for
    routers of the softmax kind. In all other cases the error is measured and reported. Experts that were trained from
    different starting points have their neurons in different orders, and their mean is worth little.

    Args:
        source (`str` or `Path`): The mixture of experts, a folder or a Hub id.
        output_dir (`str` or `Path`): The folder to write.
        num_experts (`int`): How many experts are left in every layer.
        num_experts_per_tok (`int`, *optional*): How many of them a token takes. As many as before if None.
        similarity (`str`, *optional*, defaults to `"weights"`): What must be alike: the cosine of the experts' weights, or
            of their rows of the router (`"router"`). Groups are joined by the mean over all pairs.
        statistics (`RoutingStatistics`, `str` or `Path`, *optional*): Statistics of this model, or the file that
            `RoutingStatistics.save` wrote.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        verify (`bool`, *optional*, defaults to `True`): Whether the outputs of source and result are compared.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`EditReport`]: `details` has, per layer, the groups of experts that were merged.

    Raises:
        UpcycleError: if the source cannot be merged so, or if the result should be exact and is not.

    Example:

    ```python
    >>> from hf_moe import merge_experts

    >>> report = merge_experts("mixtral-16x7b", "mixtral-8x7b", num_experts=8, num_experts_per_tok=2)
    ```
    """
    if similarity not in SIMILARITIES:
        raise UpcycleError(f"`similarity` must be one of {list(SIMILARITIES)}, got {similarity!r}.")
    output = OutputFolder(output_dir, [source], overwrite)
    moe = MoeCheckpoint(source, revision)
    moe.refuse_router_residual()
    fewest = min(block.num_experts for block in moe.blocks.values())
    if not 1 <= num_experts < fewest:
        raise UpcycleError(
            f"`num_experts` must lie between 1 and {fewest - 1}, one less than the experts there are, got {num_experts}."
        )
    counts = dict.fromkeys(moe.blocks, num_experts)
    top_k = moe.top_k_among(counts) if num_experts_per_tok is None else num_experts_per_tok
    if top_k < 1:
        raise UpcycleError(f"`num_experts_per_tok` must be at least 1, got {top_k}.")
    config = moe.with_experts(counts, top_k)
    load = load_of_layers(moe, statistics) if statistics is not None else None
    groups = {
        index: group_similar(similarity_of(moe, block, similarity), num_experts) for index, block in moe.blocks.items()
    }
    layers = {
        index: _merged(moe, moe.blocks[index], members, None if load is None else load[index])
        for index, members in groups.items()
    }
    edit = Edit(
        operation="merge",
        arguments={
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "similarity": similarity,
            "statistics": describe_statistics(statistics),
        },
        details={str(index): members for index, members in groups.items()},
        config=config,
        model_class=moe.model_class,
        steps=edit_steps(moe, layers),
        inexact_because=_inexact_because(moe, groups, top_k),
        top_k=top_k,
    )
    return write_edit(moe, output, edit, verify=verify, max_shard_size=max_shard_size, progress=progress)


def similarity_of(moe: MoeCheckpoint, block: SparseBlock, similarity: str) -> torch.Tensor:
    """
    How alike each two experts are `(E, E)`, in float64: the cosine of their weights, or of their rows of the router.

    Among experts whose weights are alike, the rows decide.
    """
    flat = [value.double().reshape(block.num_experts, -1) for value in moe.read_rows(block).values()]
    rows = sum(value @ value.T for value in flat)
    if similarity == "router":
        return _cosine(rows)
    products = torch.zeros(block.num_experts, block.num_experts, dtype=torch.float64)
    per_row = sum(tensor[0].numel() for tensor in block.expert if tensor is not None)
    count = max(1, VALUES_AT_ONCE // (block.num_experts * per_row))
    # Some rows of every tensor at a time, so that no more than a part of each expert is in memory.
    start = 0
    while (first := moe.read_expert_rows(block, 0, slice(start, start + count))).numel():
        values = torch.empty(block.num_experts, len(first), dtype=torch.float64)
        for expert_index in range(block.num_experts):
            values[expert_index] = moe.read_expert_rows(block, expert_index, slice(start, start + count))
        products += values @ values.T
        start += count
    return _cosine(products) + ROWS_DECIDE * _cosine(rows)


def _cosine(products_EE: torch.Tensor) -> torch.Tensor:
    lengths_E = products_EE.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return products_EE / lengths_E[:, None] / lengths_E


def group_similar(similarity_EE: torch.Tensor, num_groups: int) -> list[list[int]]:
    """
    Join the two groups with the largest mean similarity of their members until `num_groups` are left.

    Returns:
        `list[list[int]]`: The members of every group, ascending, the groups ordered by their first member.
    """
    groups = {index: [index] for index in range(len(similarity_EE))}
    sums_EE = similarity_EE.clone()  # of the similarities of all pairs between two groups
    sizes_E = torch.ones(len(similarity_EE), dtype=sums_EE.dtype)
    gone = torch.eye(len(similarity_EE), dtype=torch.bool)
    while len(groups) > num_groups:
        means_EE = (sums_EE / (sizes_E[:, None] * sizes_E)).masked_fill(gone, -torch.inf)
        first, second = sorted(divmod(int(means_EE.argmax()), len(similarity_EE)))
        groups[first] += groups.pop(second)
        sums_EE[first] += sums_EE[second]
        sums_EE[:, first] += sums_EE[:, second]
        sizes_E[first] += sizes_E[second]
        gone[second], gone[:, second] = True, True
    return [sorted(members) for _, members in sorted(groups.items())]


def _merged(moe: MoeCheckpoint, block: SparseBlock, groups: list[list[int]], load: torch.Tensor | None) -> EditedLayer:
    shares = [_shares(members, load) for members in groups]

    def expert(group_index: int) -> FeedForward:
        members = groups[group_index]
        experts = (moe.read_expert(block, member) for member in members)
        return weighted_mean(experts, shares[group_index])

    def rows(name: str, value: torch.Tensor) -> torch.Tensor:
        means = [
            torch.tensordot(share, value[members].double(), dims=1)
            for members, share in zip(groups, shares, strict=True)
        ]
        return torch.stack(means).to(value.dtype)

    return EditedLayer(len(groups), expert, rows)


def weighted_mean(experts, shares: torch.Tensor) -> FeedForward:
    """
    The mean of feed-forwards with weights that sum to 1, one of them in memory at a time.

    It is computed in float64, in which the mean of equal values rounds to just these.
    """
    total: dict[str, torch.Tensor] = {}
    for expert, share in zip(experts, shares.tolist(), strict=True):
        for name, tensor in zip(expert._fields, expert, strict=True):
            if tensor is not None:
                part = share * tensor.double()
                total[name] = total[name] + part if name in total else part
    return expert.map(lambda name, tensor: total[name].to(tensor.dtype))


def _shares(members: list[int], load: torch.Tensor | None) -> torch.Tensor:
    """The weights of a group's members; equal where there is no load."""
    weights = torch.ones(len(members), dtype=torch.float64) if load is None else load[members]
    weights = weights if weights.sum() > 0 else torch.ones_like(weights)
    return weights / weights.sum()


def _inexact_because(moe: MoeCheckpoint, groups: dict[int, list[list[int]]], top_k: int) -> str | None:
    sizes = {len(members) for layer in groups.values() for members in layer}
    if len(sizes) > 1 or moe.top_k != top_k * sizes.pop():
        return "a token does not take all members of the groups that it takes"
    if (reason := moe.copies_differ_because()) is not None:
        return reason
    for index, layer in groups.items():
        block = moe.blocks[index]
        rows = moe.router_weight(block)
        if has_equal_rows(rows[[members[0] for members in layer]]):
            return f"rows of the router in layer {index} are equal, so that chance decides between experts"
        if any(not torch.equal(rows[members[0]], rows[member]) for members in layer for member in members):
            return f"the rows of the router that are merged in layer {index} differ"
        for members in layer:
            first = moe.read_expert(block, members[0])
            for member in members[1:]:
                if not equal(first, moe.read_expert(block, member)):
                    return f"experts that are merged in layer {index} differ"
    return None


def equal(one: FeedForward, other: FeedForward) -> bool:
    """Whether two feed-forwards are equal to the bit."""
    return all(a is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))
