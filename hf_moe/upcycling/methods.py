# SPDX-License-Identifier: Apache-2.0
"""
The ways to make experts out of one dense feed-forward.

A method is one function from a [`FeedForward`] to a [`SparseLayer`], decorated with [`upcycling_method`], which enters
it in `METHODS` with its reference and the condition under which the result computes what the dense model computes.

Shapes: H hidden size, I intermediate size; gate and up are `(I, H)`, down is `(H, I)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


class FeedForward(NamedTuple):
    """The weights of one gated feed-forward: gate `(I, H)`, up `(I, H)`, down `(H, I)`."""

    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor


class SparseLayer(NamedTuple):
    """
    What takes the place of a dense feed-forward.

    `expert(e)` makes the weights of expert e when they are asked for, so that memory does not grow with their number;
    it gives the same values each time.
    """

    expert: Callable[[int], FeedForward]
    shared_expert: FeedForward | None = None


@dataclass(frozen=True)
class Method:
    """An entry of `METHODS`. `inexact_because(config)` is None when the method preserves the function, else the reason."""

    paper: str | None
    inexact_because: Callable[["UpcycleConfig"], str | None]
    build: Callable[[FeedForward, "UpcycleConfig", int], SparseLayer]


METHODS: dict[str, Method] = {}


def upcycling_method(
    name: str, *, inexact_because: Callable[["UpcycleConfig"], str | None], paper: str | None = None
) -> Callable:
    """Enter the decorated function in `METHODS`; its arguments are the feed-forward, the recipe and the layer's index."""

    def register(build):
        if name in METHODS:
            raise ValueError(f"There is a method {name!r} already.")
        METHODS[name] = Method(paper, inexact_because, build)
        return build

    return register


@upcycling_method(
    "copy",
    paper="https://huggingface.co/papers/2212.05055",
    inexact_because=lambda config: (
        None if config.norm_topk_prob else "the weights of the chosen experts do not sum to 1 (norm_topk_prob=False)"
    ),
)
def copy(dense: FeedForward, config: "UpcycleConfig", layer_index: int) -> SparseLayer:
    """
    Sparse upcycling: every expert is the dense feed-forward.

    With weights that sum to 1 this is exact for any router. It also makes the router's gradient from the language
    model's loss zero until the experts differ: train with the load-balancing loss on.
    """
    return SparseLayer(expert=lambda expert_index: dense)


@upcycling_method("residual", inexact_because=lambda config: None)
def residual(dense: FeedForward, config: "UpcycleConfig", layer_index: int) -> SparseLayer:
    """
    The dense feed-forward stays as shared expert; routed experts share its gate and up and start with down = 0.

    Like the B matrix of LoRA, the zero makes the routed part silent at first, so this is exact for any router and any
    weighting. Training moves the down-projections in the first step, and the router from the second.
    """
    routed = FeedForward(dense.gate_proj, dense.up_proj, torch.zeros_like(dense.down_proj))
    return SparseLayer(expert=lambda expert_index: routed, shared_expert=dense)
