# SPDX-License-Identifier: Apache-2.0
"""
The first weights of a router.

An initialiser is one function decorated with [`router_initializer`], which enters it in `ROUTER_INITIALIZERS`. It makes
one row per expert, or per copy where several experts are the parts of one. Those in this file look at weights alone, those
in `router_data.py` at hidden states.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UpcycleError
from .feed_forward import LayerContext


ROUTER_ROWS = "router_rows"


@dataclass(frozen=True)
class RouterInitializer:
    """
    An entry of `ROUTER_INITIALIZERS`.

    Args:
        build: From the number of rows R, what is known of the router's inputs and the layer's context to the rows `(R, H)`
            in float32. What is known is a [`RouterInput`], or what was [`Seen`] if the initialiser needs text.
        needs (`str`, *optional*): `"text"` for calibration text, `"domains"` for one text per row, `"prompts"` for prompts
            per row; None for weights alone.
        of_layer (`bool`): Whether what is seen are the router's inputs of the layer, or the model's last hidden states.
        paper (`str`, *optional*): Where it was proposed.
    """

    build: Callable[[int, Any, LayerContext], torch.Tensor]
    needs: str | None
    of_layer: bool
    paper: str | None


@dataclass(frozen=True)
class RouterInput:
    """
    What is known of the hidden states that a router will see, from the weights alone.

    Args:
        hidden_size (`int`): Their size H.
        length (`float`): Root mean square of their length, the shift left out.
        shift (`torch.Tensor` of shape `(H,)`, *optional*): What is added to every one of them: the bias of a LayerNorm.
    """

    hidden_size: int
    length: float
    shift: torch.Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """
    Hidden states of calibration text, padding left out, in float32.

    Args:
        inputs_TH (`torch.Tensor` of shape `(T, H)`): What the feed-forward, and so the router, gets.
        sequence_T (`torch.Tensor` of shape `(T,)`): Which sequence each token belongs to, counted from 0.
        domain_T (`torch.Tensor` of shape `(T,)`): Which text, or which expert's prompts, each token belongs to.
        num_domains (`int`): Number of texts, or of experts with prompts.
        is_negative_T (`torch.Tensor` of shape `(T,)`): Whether the token belongs to a negative prompt.
        folder (`Path`, *optional*): Where what must be kept for later is written; None if nothing is.
    """

    inputs_TH: torch.Tensor
    sequence_T: torch.Tensor
    domain_T: torch.Tensor
    num_domains: int
    is_negative_T: torch.Tensor
    folder: Path | None = None


ROUTER_INITIALIZERS: dict[str, RouterInitializer] = {}


def router_initializer(
    name: str, *, needs: str | None = None, of_layer: bool = True, paper: str | None = None
) -> Callable:
    """Enter the decorated function in `ROUTER_INITIALIZERS`; the arguments are those of [`RouterInitializer`]."""

    def register(build: Callable[[int, Any, LayerContext], torch.Tensor]):
        if name in ROUTER_INITIALIZERS:
            raise ValueError(f"There is a router initialiser {name!r} already.")
        ROUTER_INITIALIZERS[name] = RouterInitializer(build, needs, of_layer, paper)
        return build

    return register


def build_router(router_input: RouterInput, experts_per_copy: int, context: LayerContext) -> torch.Tensor:
    """The weight of a layer's router `(E, H)` in float32; the parts of one copy share a row."""
    initializer = ROUTER_INITIALIZERS[context.recipe.router_init]
    if initializer.needs is None:
        rows = initializer.build(context.num_experts // experts_per_copy, router_input, context)
    else:
        rows = context.observations[ROUTER_ROWS]
    return rows.repeat_interleave(experts_per_copy, dim=0)


@router_initializer("normal")
def normal(num_rows: int, router_input: RouterInput, context: LayerContext) -> torch.Tensor:
    """
    Normal rows scaled so that the logits have a standard deviation of `router_logit_std` over the tokens.

    They are orthogonal to what every hidden state has in common, the bias of a LayerNorm: it would favour the same
    experts for every token.
    """
    # On the CPU and in fixed types, so that the result depends neither on the device nor on torch's defaults.
    rows = [
        torch.randn(
            router_input.hidden_size, generator=context.generator(index, "router"), dtype=torch.float32, device="cpu"
        )
        for index in range(num_rows)
    ]
    return _without_shift(torch.stack(rows), router_input) * (context.recipe.router_logit_std / router_input.length)


@router_initializer("orthogonal")
def orthogonal(num_rows: int, router_input: RouterInput, context: LayerContext) -> torch.Tensor:
    """Rows that are orthogonal to each other, with the same logits' standard deviation as `normal`; fewer than H of them."""
    if num_rows >= router_input.hidden_size:
        raise UpcycleError(
            f"router_init='orthogonal' makes fewer rows than the hidden size ({router_input.hidden_size}), not {num_rows}. "
            "Use 'normal'."
        )
    random = torch.randn(
        num_rows, router_input.hidden_size, generator=context.generator(0, "router"), dtype=torch.float32, device="cpu"
    )
    directions = torch.linalg.qr(_without_shift(random, router_input).T)[0].T
    length = context.recipe.router_logit_std / router_input.length * math.sqrt(router_input.hidden_size)
    return directions.contiguous() * length


@router_initializer("zero")
def zero(num_rows: int, router_input: RouterInput, context: LayerContext) -> torch.Tensor:
    """
    A router without a preference. All logits tie, so every token goes to the same experts until training breaks the tie:
    train with a balance loss, `expert_noise` or a selection bias, or the other experts get no gradient.
    """
    return torch.zeros(num_rows, router_input.hidden_size, dtype=torch.float32, device="cpu")


def _without_shift(rows: torch.Tensor, router_input: RouterInput) -> torch.Tensor:
    if router_input.shift is None or not router_input.shift.any():
        return rows
    direction = torch.nn.functional.normalize(router_input.shift.float(), dim=0)
    return rows - (rows @ direction)[:, None] * direction
