# SPDX-License-Identifier: Apache-2.0
"""
The ways to make experts out of one dense feed-forward.

A method is one function from a [`FeedForward`] and a [`LayerContext`] to a [`SparseLayer`], decorated with
[`upcycling_method`], which enters it in `METHODS` with its paper, its cost, the sizes of its experts and the condition
under which the result computes what the dense model computes.

Letters: E routed experts, K of them per token, I intermediate size of the dense feed-forward, G granularity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import UpcycleError
from .feed_forward import FeedForward, LayerContext, LayerSizes, SparseLayer
from .partition import partition_neurons
from .routing import (
    has_loud_zero_experts,
    ranks_all_experts,
    unsteady_because,
    varying_because,
    weighs_all_alike,
    weight_sum,
    weight_sum_at_zero,
)
from .scaling import expected_sum, scaling_rounds, with_whole_weight


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


@dataclass(frozen=True)
class Method:
    """
    An entry of `METHODS`.

    Args:
        build: Makes the sparse layer.
        cost (`str`): What the method costs in parameters and in operations per token, in words.
        paper (`str`, *optional*): Where it was proposed.
        inexact_because: From the recipe, the data type of the weights and whether the feed-forward has a gate to None if
            the method preserves the function, else the reason why it does not.
        sizes: From the recipe, E and I to the sizes of the experts; refuses what does not divide.
        noise_is_silent (`bool`): Whether `expert_noise` leaves the output as it is.
    """

    build: Callable[[FeedForward, LayerContext], SparseLayer]
    cost: str
    paper: str | None
    inexact_because: Callable[["UpcycleConfig", torch.dtype, bool], str | None]
    sizes: Callable[["UpcycleConfig", int, int], LayerSizes]
    noise_is_silent: bool


METHODS: dict[str, Method] = {}


def upcycling_method(
    name: str,
    *,
    cost: str,
    inexact_because: Callable[["UpcycleConfig", torch.dtype, bool], str | None],
    sizes: Callable[["UpcycleConfig", int, int], LayerSizes] = lambda recipe, num_experts, size: LayerSizes(size),
    paper: str | None = None,
    noise_is_silent: bool = False,
) -> Callable:
    """Enter the decorated function in `METHODS`; the arguments are those of [`Method`]."""

    def register(build: Callable[[FeedForward, LayerContext], SparseLayer]):
        if name in METHODS:
            raise ValueError(f"There is a method {name!r} already.")
        METHODS[name] = Method(build, cost, paper, inexact_because, sizes, noise_is_silent)
        return build

    return register


def inexact_because(recipe: "UpcycleConfig", dtype: torch.dtype, is_gated: bool) -> str | None:
    """Why the result will not compute what the dense model computes; None if it will."""
    method = METHODS[recipe.method]
    reason = method.inexact_because(recipe, dtype, is_gated)
    if reason is None and recipe.expert_noise and not method.noise_is_silent:
        return f"noise is added to the experts (expert_noise={recipe.expert_noise})"
    if reason is None and recipe.max_kl is not None:
        return f"noise is added to the experts, as much as max_kl={recipe.max_kl} allows"
    return reason


def build_sparse_layer(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """What the recipe's method makes of one dense feed-forward, noise included."""
    recipe = context.recipe
    layer = METHODS[recipe.method].build(dense, context)
    if not recipe.expert_noise:
        return layer
    return layer._replace(expert=lambda e: _with_noise(layer.expert(e), recipe.expert_noise, context, e))


def _with_noise(expert: FeedForward, relative_std: float, context: LayerContext, expert_index: int) -> FeedForward:
    """The expert with noise whose standard deviation is `relative_std` times that of each tensor."""

    def disturb(name: str, tensor: torch.Tensor) -> torch.Tensor:
        generator = context.generator(expert_index, f"noise/{name}")
        return add_noise(tensor, relative_std * tensor.float().std(correction=0), generator)

    return expert.map(disturb)


def add_noise(tensor: torch.Tensor, std: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The tensor with normal noise of this standard deviation, in its own data type."""
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (tensor.float() + noise * std).to(tensor.dtype)


# --- Exact methods ---------------------------------------------------------------------------------------------------


def _copy_is_inexact(recipe: "UpcycleConfig", dtype: torch.dtype, is_gated: bool) -> str | None:
    sums = [weight_sum(recipe, count) for count in recipe.expert_counts]
    if None in sums:
        sums = [weight_sum_at_zero(recipe, count) for count in recipe.expert_counts]
        if not all(sums):
            return unsteady_because(recipe)
        if recipe.router_init != "zero":
            return f"{unsteady_because(recipe)}; only a router of zeros is exact"
    reasons = (scaling_rounds(recipe, 1 / total, dtype, is_gated) for total in sums if total)
    return next((reason for reason in reasons if reason is not None), None)


@upcycling_method(
    "copy",
    paper="https://huggingface.co/papers/2212.05055",
    cost="E times the parameters and K times the operations of the feed-forward",
    inexact_because=_copy_is_inexact,
)
def copy(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    Sparse upcycling: every expert is the dense feed-forward.

    With weights that sum to 1 this is exact for any router. It also makes the router's gradient from the language
    model's loss zero until the experts differ: train with the load-balancing loss on. Without `norm_topk_prob` the K
    weights of a router of zeros sum to K / E, which the experts make up for.
    """
    dense = with_whole_weight(dense, context)
    return SparseLayer(expert=lambda expert_index: dense)


def _residual_is_inexact(recipe: "UpcycleConfig", dtype: torch.dtype, is_gated: bool) -> str | None:
    return "copy and constant experts add to the output" if has_loud_zero_experts(recipe) else None


def _residual_sizes(recipe: "UpcycleConfig", num_experts: int, size: int) -> LayerSizes:
    return LayerSizes(_shard_size(recipe, size), shared_expert=size)


@upcycling_method(
    "residual",
    cost="1 + E / G times the parameters and 1 + K / G times the operations of the feed-forward",
    inexact_because=_residual_is_inexact,
    sizes=_residual_sizes,
    noise_is_silent=True,
)
def residual(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    The dense feed-forward stays as shared expert; routed experts take its gate and up and start with down = 0.

    Like the B matrix of LoRA, the zero makes the routed part silent at first, so this is exact for any router and any
    weighting. Training moves the down-projections in the first step, and the router from the second. With a granularity
    G above 1 each routed expert takes an I / G part of the neurons, drawn without replacement over every G experts.
    """
    granularity = context.recipe.granularity
    routed = dense.silent()
    if granularity == 1:
        return SparseLayer(expert=lambda expert_index: routed, shared_expert=dense)
    size = dense.intermediate_size // granularity

    def expert(expert_index: int) -> FeedForward:
        copy_index, shard = divmod(expert_index, granularity)
        neurons = torch.randperm(dense.intermediate_size, generator=context.generator(copy_index, "residual"))
        return routed.take(neurons[shard * size : (shard + 1) * size])

    return SparseLayer(expert=expert, shared_expert=dense)


def _granular_is_inexact(recipe: "UpcycleConfig", dtype: torch.dtype, is_gated: bool) -> str | None:
    sums = [weight_sum(recipe, count) for count in recipe.expert_counts]
    if None in sums:
        return unsteady_because(recipe)
    reasons = (scaling_rounds(recipe, recipe.granularity / total, dtype, is_gated) for total in sums if total)
    return next((reason for reason in reasons if reason is not None), None)


def _granular_sizes(recipe: "UpcycleConfig", num_experts: int, size: int) -> LayerSizes:
    granularity = recipe.granularity
    if not ranks_all_experts(recipe):
        raise UpcycleError(
            f"Method 'granular' gives the parts of a copy equal scores, so that a token gets all of them or none; router_type="
            f"{recipe.router_type!r} with router_options={recipe.router_options} does not choose the largest scores of all experts. Use "
            "another router, or 'copy' or 'residual'."
        )
    for field, value in (("num_experts", num_experts), ("num_experts_per_tok", recipe.num_experts_per_tok)):
        if value % granularity:
            raise UpcycleError(
                f"Method 'granular' needs `{field}` to be a multiple of `granularity` ({granularity}), so that a token gets "
                f"every part of a copy or none; got {value}."
            )
    return LayerSizes(_shard_size(recipe, size), experts_per_copy=granularity)


@upcycling_method(
    "granular",
    paper="https://huggingface.co/papers/2410.07524",
    cost="E / G times the parameters and K / G times the operations of the feed-forward",
    inexact_because=_granular_is_inexact,
    sizes=_granular_sizes,
)
def granular(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    Virtual groups: each of E / G copies of the feed-forward is cut into G experts, which share a row of the router.

    A token whose K / G best rows are chosen gets whole copies, each part with a weight of 1 / G of the copy's; the
    experts make up for the G. Without `norm_topk_prob` the factor is that for a router of zeros, E * G / K.
    """
    recipe = context.recipe
    size = dense.intermediate_size // recipe.granularity
    scaled = with_whole_weight(dense, context, recipe.granularity)

    def expert(expert_index: int) -> FeedForward:
        shard = expert_index % recipe.granularity
        return scaled.take(slice(shard * size, (shard + 1) * size))

    return SparseLayer(expert=expert)


def _shard_size(recipe: "UpcycleConfig", size: int) -> int:
    if size % recipe.granularity:
        raise UpcycleError(
            f"`granularity` ({recipe.granularity}) must divide the dense intermediate size ({size}); its divisors up to 64 "
            f"are {[divisor for divisor in range(1, 65) if size % divisor == 0]}."
        )
    return size // recipe.granularity


# --- Methods that change the function --------------------------------------------------------------------------------


def _drop_is_inexact(recipe: "UpcycleConfig", dtype: torch.dtype, is_gated: bool) -> str | None:
    if recipe.reinit_ratio:
        return f"a part of every expert is initialised anew (reinit_ratio={recipe.reinit_ratio})"
    return _copy_is_inexact(recipe, dtype, is_gated)


@upcycling_method(
    "drop",
    paper="https://huggingface.co/papers/2502.19261",
    cost="E times the parameters and K times the operations of the feed-forward",
    inexact_because=_drop_is_inexact,
)
def drop(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    Drop-Upcycling: in every copy a share `reinit_ratio` of the neurons is drawn anew.

    The new weights are normal with the mean and standard deviation of those they replace. With `index_sets="shared"` the
    same neurons are replaced in all matrices, as in the paper; `"independent"` draws them for each matrix, as in the
    script that was released with it, which leaves far fewer neurons intact.
    """
    recipe = context.recipe
    dense = with_whole_weight(dense, context)
    count = math.floor(recipe.reinit_ratio * dense.intermediate_size)

    def expert(expert_index: int) -> FeedForward:
        def replace(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "down_bias":
                return tensor
            # A bias goes with the rows of its matrix.
            purpose = "" if recipe.index_sets == "shared" else name.partition("_")[0]
            order = torch.randperm(
                dense.intermediate_size, generator=context.generator(expert_index, f"drop{purpose}")
            )
            dimension = 1 if name == "down_proj" else 0
            index = order[:count].to(tensor.device)
            old = tensor.index_select(dimension, index)
            new = _drawn_like(old, context.generator(expert_index, f"drop/{name}"))
            return tensor.index_copy(dimension, index, new)

        return dense.map(replace) if count else dense

    return SparseLayer(expert=expert)


def _drawn_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal values with the mean and standard deviation of `tensor`."""
    values = tensor.float()
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (values.mean() + noise * values.std(correction=0)).to(tensor.dtype)


def _qwen_sizes(recipe: "UpcycleConfig", num_experts: int, size: int) -> LayerSizes:
    return LayerSizes(_shard_size(recipe, size))


@upcycling_method(
    "qwen",
    paper="https://huggingface.co/papers/2407.10671",
    cost="E / G times the parameters and K / G times the operations of the feed-forward",
    inexact_because=lambda recipe, dtype, is_gated: (
        f"every expert is a random part of the neurons, with a share of {recipe.reinit_ratio} of its weights drawn anew"
    ),
    sizes=_qwen_sizes,
)
def qwen(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    Qwen's fine-grained upcycling: replicate, shuffle, slice, and draw a share `reinit_ratio` of the weights anew.

    As many copies as E experts of size I / G need are shuffled along the neurons, each in its own order, and cut into
    the experts. In every tensor of an expert, weights chosen one by one are then replaced by normal ones of the same mean
    and standard deviation.
    """
    recipe = context.recipe
    dense = with_whole_weight(dense, context)
    size = dense.intermediate_size // recipe.granularity

    def expert(expert_index: int) -> FeedForward:
        copy_index, shard = divmod(expert_index, recipe.granularity)
        neurons = torch.randperm(dense.intermediate_size, generator=context.generator(copy_index, "qwen"))

        def replace(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "down_bias":
                return tensor
            generator = context.generator(expert_index, f"qwen/{name}")
            chosen = torch.rand(tensor.shape, generator=generator) < recipe.reinit_ratio
            return torch.where(chosen.to(tensor.device), _drawn_like(tensor, generator), tensor)

        return dense.take(neurons[shard * size : (shard + 1) * size]).map(replace)

    return SparseLayer(expert=expert)


def _split_is_inexact(recipe: "UpcycleConfig", dtype: torch.dtype, is_gated: bool) -> str | None:
    num_experts = recipe.num_experts_per_tok
    if any(num_experts < count for count in recipe.expert_counts):
        return varying_because(recipe) or (
            "a token gets a part of the dense neurons only (split with num_experts_per_tok < num_experts)"
        )
    if weighs_all_alike(recipe, num_experts, std=0.0 if recipe.router_init == "zero" else 1.0):
        return scaling_rounds(recipe, num_experts / expected_sum(recipe, num_experts), dtype, is_gated)
    if weighs_all_alike(recipe, num_experts, std=0.0):
        return "the experts are weighted unequally; with all of them chosen, router_init='zero' is exact"
    return varying_because(recipe) or unsteady_because(recipe)


def _split_sizes(recipe: "UpcycleConfig", num_experts: int, size: int) -> LayerSizes:
    routed = size - recipe.num_shared_neurons
    if routed <= 0 or routed % num_experts:
        raise UpcycleError(
            f"Method 'split' deals {routed} neurons (the dense intermediate size {size} less num_shared_neurons="
            f"{recipe.num_shared_neurons}) out to {num_experts} experts, which does not come out even. Choose `num_experts` "
            "and `num_shared_neurons` so that it does."
        )
    return LayerSizes(routed // num_experts, shared_expert=recipe.num_shared_neurons or None)


@upcycling_method(
    "split",
    paper="https://huggingface.co/papers/2406.16554",
    cost="the parameters of the feed-forward and K / E times its operations",
    inexact_because=_split_is_inexact,
    sizes=_split_sizes,
)
def split(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    The neurons are dealt out to the experts, each to one; `num_shared_neurons` of them form a shared expert.

    Which neuron goes where is decided by [`hf_moe.upcycling.partition.partition_neurons`] after `split_by`. The routed
    experts are scaled by K, since weights that sum to 1 are 1 / K each when the router has no preference.
    """
    recipe = context.recipe
    groups, shared = partition_neurons(dense, context)
    scaled = with_whole_weight(dense, context, recipe.num_experts_per_tok)
    shared_expert = None
    if len(shared):
        shared_expert = dense.take(shared)
        if shared_expert.down_bias is not None:  # the routed experts have it already
            shared_expert = shared_expert._replace(down_bias=torch.zeros_like(shared_expert.down_bias))
    return SparseLayer(expert=lambda expert_index: scaled.take(groups[expert_index]), shared_expert=shared_expert)
