# SPDX-License-Identifier: Apache-2.0
"""
The dense feed-forward that a sparse layer goes back to.

How the experts were made decides what it is: one function per upcycling method, from a [`SparseView`] to the
feed-forward, decorated with [`collapses`], which enters it in `COLLAPSES`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward, LayerContext
from ..upcycling.partition import partition_neurons
from ..upcycling.recipe import UpcycleConfig
from ..upcycling.scaling import expected_sum, scale_output
from .dense_parent import DenseParent
from .merge import equal, weighted_mean
from .moe_checkpoint import MoeCheckpoint
from .sparse_block import SparseBlock


@dataclass(frozen=True)
class SparseView:
    """
    One sparse layer, and what is known of how it was made.

    Args:
        moe (`MoeCheckpoint`), index (`int`): The layer.
        parent (`DenseParent`): The dense model that it goes back to.
        expert (`str` or `int`): `"mean"`, or the expert that was asked for.
    """

    moe: MoeCheckpoint
    index: int
    parent: DenseParent
    expert: str | int

    @property
    def recipe(self) -> UpcycleConfig:
        """How the experts were made, the default if that is not known."""
        return self.parent.recipe or UpcycleConfig()

    @property
    def weight_sum(self) -> float | None:
        """What the weights of the chosen experts sum to; None if that depends on the token."""
        return 1.0 if self.parent.target.normalizes else self.moe.weight_sum

    @property
    def block(self) -> SparseBlock:
        return self.moe.blocks[self.index]

    def experts(self, indices: range | None = None) -> Iterator[FeedForward]:
        """The routed experts, or some of them, one by one."""
        for index in range(self.block.num_experts) if indices is None else indices:
            yield self.moe.read_expert(self.block, index)

    def all_equal(self) -> bool:
        """Whether all routed experts are equal to the bit."""
        first = self.moe.read_expert(self.block, 0)
        return all(equal(first, expert) for expert in self.experts())

    def routed_are_silent(self) -> bool:
        """Whether the routed experts give zero whatever their input."""
        return all(is_silent(expert) for expert in self.experts())

    @property
    def shared_expert(self) -> FeedForward | None:
        """The shared expert, if there is one."""
        shared, moe, layer = self.parent.target.shared_expert, self.moe, self.block.layer
        names = [] if shared is None else shared.names.tensors(layer, moe.name_on_disk)
        if shared is None or not names:
            return None
        return shared.names.read(layer, {name: moe.checkpoint.read(moe.name_on_disk[name]) for name in names})

    @property
    def needed_shared_expert(self) -> FeedForward:
        """The shared expert, which the method makes."""
        shared = self.shared_expert
        if shared is None:
            raise UpcycleError(
                f"hf_moe.json says that the experts were made by method {self.recipe.method!r}, but layer {self.index} has no "
                "shared expert. Does it belong to this checkpoint?"
            )
        return shared

    @property
    def rows(self) -> torch.Tensor:
        """The weight of the router `(E, H)`."""
        return self.moe.router_weight(self.block)

    @property
    def missing_weight(self) -> float:
        """The factor by which the method made up for weights that do not sum to 1."""
        counts = self.recipe.expert_counts
        made = counts[list(self.moe.blocks).index(self.index)] if len(counts) > 1 else counts[0]
        return 1 / expected_sum(self.recipe, made)


@dataclass(frozen=True)
class Collapse:
    """
    An entry of `COLLAPSES`.

    Args:
        build: Makes the dense feed-forward of a layer.
        size: Its number of neurons.
        inexact_because: From a layer to the reason why its feed-forward need not compute what the layer computes, None if it
            must, provided that the method preserved the function and weights sum to 1.
        takes_one (`bool`): Whether one expert can be asked for in place of the mean.
        needs_all (`bool`): Whether the experts belong together, so that none may be added or removed.
    """

    build: Callable[[SparseView], FeedForward]
    size: Callable[[SparseView], int]
    inexact_because: Callable[[SparseView], str | None]
    takes_one: bool
    needs_all: bool


COLLAPSES: dict[str, Collapse] = {}


def collapses(
    *methods: str,
    size: Callable[[SparseView], int],
    inexact_because: Callable[[SparseView], str | None],
    takes_one: bool = False,
    needs_all: bool = False,
) -> Callable:
    """Enter the decorated function in `COLLAPSES`; the arguments are those of [`Collapse`]."""

    def register(build: Callable[[SparseView], FeedForward]):
        COLLAPSES.update(dict.fromkeys(methods, Collapse(build, size, inexact_because, takes_one, needs_all)))
        return build

    return register


def is_silent(expert: FeedForward) -> bool:
    """Whether the output is zero whatever the input."""
    return not expert.down_proj.any() and (expert.down_bias is None or not expert.down_bias.any())


def _copies_differ(view: SparseView) -> str | None:
    if view.weight_sum is None:
        is_as_made = view.parent.recipe is not None and not view.rows.any()
    else:
        is_as_made = abs(view.weight_sum * view.missing_weight - 1) < 1e-6
    if not is_as_made:
        return "the weights of the chosen experts do not sum to 1"
    if not view.all_equal():
        return f"the experts of layer {view.index} differ"
    return _shared_expert_is_left_out(view)


def _shared_expert_is_left_out(view: SparseView) -> str | None:
    shared = view.shared_expert
    if shared is None or is_silent(shared):
        return None
    return f"the shared expert of layer {view.index}, for which a dense feed-forward has no place, is left out"


@collapses(
    "copy",
    "drop",
    "compose",
    size=lambda view: view.block.expert.intermediate_size,
    inexact_because=_copies_differ,
    takes_one=True,
)
def of_copies(view: SparseView) -> FeedForward:
    """The mean of the experts, or one of them."""
    count = view.block.num_experts
    if isinstance(view.expert, int):
        experts = view.moe.read_expert(view.block, view.expert)
    else:
        experts = weighted_mean(view.experts(), torch.full((count,), 1 / count, dtype=torch.float64))
    missing = view.missing_weight
    return _without_scale(experts, missing, view.recipe.scale_on, bias_scale=missing)


@collapses(
    "residual",
    size=lambda view: view.needed_shared_expert.intermediate_size,
    inexact_because=lambda view: (
        None if view.routed_are_silent() else f"the routed experts of layer {view.index} have learned"
    ),
)
def of_residual(view: SparseView) -> FeedForward:
    """
    The shared expert, and what the routed ones have learned to add to its neurons.

    They start with the gate and up of the shared expert and down = 0, so that to first order training moves down alone: the
    mean of the routed downs, each with the share 1 / E of the weight, adds to the shared one. Experts that have a part of
    the neurons only are left out.
    """
    shared, count = view.needed_shared_expert, view.block.num_experts
    if view.block.expert.intermediate_size != shared.intermediate_size:
        return shared
    mean = weighted_mean(view.experts(), torch.full((count,), 1 / count, dtype=torch.float64))

    return shared.map(lambda name, tensor: _plus(tensor, getattr(mean, name)) if name.startswith("down") else tensor)


def _parts_differ(view: SparseView) -> str | None:
    granularity, rows = view.recipe.granularity, view.rows
    if view.moe.top_k % granularity:
        return f"a token takes {view.moe.top_k} experts, which are no whole copies of {granularity}"
    grouped = rows.unflatten(0, (-1, granularity))
    if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
        return f"the parts of a copy in layer {view.index} have different rows of the router"
    copies = _copies(view)
    first = next(copies)
    if not all(equal(first, copy) for copy in copies):
        return f"the copies in layer {view.index} differ"
    return _shared_expert_is_left_out(view)


@collapses(
    "granular",
    size=lambda view: view.block.expert.intermediate_size * view.recipe.granularity,
    inexact_because=_parts_differ,
    takes_one=True,
    needs_all=True,
)
def of_granular(view: SparseView) -> FeedForward:
    """The parts of a copy side by side, the mean of all copies or the one that the expert belongs to."""
    granularity, missing = view.recipe.granularity, view.missing_weight
    count = view.block.num_experts // granularity
    if isinstance(view.expert, int):
        first = view.expert // granularity * granularity
        copy = _side_by_side(list(view.experts(range(first, first + granularity))))
    else:
        copy = weighted_mean(_copies(view), torch.full((count,), 1 / count, dtype=torch.float64))
    return _without_scale(copy, granularity * missing, view.recipe.scale_on, bias_scale=missing)


def _copies(view: SparseView) -> Iterator[FeedForward]:
    granularity = view.recipe.granularity
    for first in range(0, view.block.num_experts, granularity):
        yield _side_by_side(list(view.experts(range(first, first + granularity))))


def _parts_are_weighted(view: SparseView) -> str | None:
    if view.moe.top_k < view.block.num_experts:
        return "a token takes a part of the neurons only"
    if view.rows.any():
        return f"the router weights the experts of layer {view.index} unequally"
    return None if view.recipe.num_shared_neurons else _shared_expert_is_left_out(view)


@collapses(
    "split",
    size=lambda view: view.block.expert.intermediate_size * view.block.num_experts + view.recipe.num_shared_neurons,
    inexact_because=_parts_are_weighted,
    needs_all=True,
)
def of_split(view: SparseView) -> FeedForward:
    """The neurons of all experts and of the shared one, in their old order where it can be drawn again."""
    recipe = view.recipe
    routed = _side_by_side(list(view.experts()))
    missing = view.missing_weight
    dense = _without_scale(routed, recipe.num_experts_per_tok * missing, recipe.scale_on, bias_scale=missing)
    if recipe.num_shared_neurons:
        shared = view.needed_shared_expert
        bias = None if dense.down_bias is None else _plus(dense.down_bias, shared.down_bias)
        dense = _side_by_side([dense, shared])._replace(down_bias=bias)
    if recipe.split_by != "random":
        return dense
    context = LayerContext(recipe, view.index, view.block.num_experts)
    groups, _ = partition_neurons(dense, context)
    return dense.take(torch.cat(groups).argsort())


def _side_by_side(parts: list[FeedForward]) -> FeedForward:
    """One feed-forward with the neurons of all parts; its output bias is the mean of theirs."""

    def join(name: str, first: torch.Tensor) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        if name != "down_bias":
            return torch.cat(tensors, dim=1 if name == "down_proj" else 0)
        if all(torch.equal(first, tensor) for tensor in tensors):
            return first
        return torch.stack(tensors).double().mean(dim=0).to(first.dtype)

    return parts[0].map(join)


def _plus(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum; where `other` is zero, `tensor` to the bit, that is with the sign of a zero."""
    return torch.where(other == 0, tensor, (tensor.double() + other.double()).to(tensor.dtype))


def _without_scale(feed_forward: FeedForward, scale: float, scale_on: str, bias_scale: float = 1) -> FeedForward:
    """Undo [`~hf_moe.upcycling.scaling.scale_output`]."""
    factors = scale_output(feed_forward.map(lambda name, tensor: torch.ones(1)), scale, scale_on, bias_scale)

    def divide(name: str, tensor: torch.Tensor) -> torch.Tensor:
        factor = getattr(factors, name).item()
        return tensor if factor == 1 else (tensor.double() / factor).to(tensor.dtype)

    return feed_forward.map(divide)
