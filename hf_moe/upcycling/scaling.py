# SPDX-License-Identifier: Apache-2.0
"""Multiplying what a feed-forward adds to its output: `scale_output`, and when a method needs it."""

import math
from typing import TYPE_CHECKING

import torch

from .feed_forward import FeedForward, LayerContext
from .routing import weight_sum, weight_sum_at_zero


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


def with_whole_weight(dense: FeedForward, context: LayerContext, num_parts: int = 1) -> FeedForward:
    """
    The feed-forward, made up for weights that do not sum to 1, and for being cut into `num_parts` that each get one of these
    parts of a weight. Where the sum depends on the token, it is that of a router of zeros.
    """
    recipe = context.recipe
    missing = 1 / expected_sum(recipe, context.num_experts)
    return scale_output(dense, num_parts * missing, recipe.scale_on, bias_scale=missing)


def expected_sum(recipe: "UpcycleConfig", num_experts: int) -> float:
    """What the weights of a token sum to, or with a router of zeros would; 1 if that cannot be said."""
    return weight_sum(recipe, num_experts) or weight_sum_at_zero(recipe, num_experts) or 1.0


def scale_output(dense: FeedForward, scale: float, scale_on: str, bias_scale: float = 1) -> FeedForward:
    """
    Multiply what the neurons add to the output by `scale`, and the output bias by `bias_scale`.

    `"up_down"` shares the factor out between the two matrices in which the output is linear: up and down with a gate,
    down alone without. A power of two is split into two, which no data type rounds. `"down"` scales down alone.
    `"megatron"` takes the same root of the factor for all matrices, as Megatron-Core does; the activation is not
    homogeneous, so that this changes the function.
    """
    if scale == 1:
        return dense
    factors = dict.fromkeys(("gate", "up", "down"), 1.0)
    if scale_on == "megatron":
        factors = dict.fromkeys(factors, scale ** (1 / 3 if dense.is_gated else 1 / 2))
    elif scale_on == "up_down" and dense.is_gated:
        exponent = math.log2(scale)
        half = exponent // 2 if exponent.is_integer() else exponent / 2
        factors |= {"up": 2**half, "down": 2 ** (exponent - half)}
    else:
        factors["down"] = scale

    def multiply(name: str, tensor: torch.Tensor) -> torch.Tensor:
        factor = bias_scale if name == "down_bias" else factors[name.partition("_")[0]]
        return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)

    return dense.map(multiply)


def scaling_rounds(recipe: "UpcycleConfig", scale: float, dtype: torch.dtype, is_gated: bool) -> str | None:
    """Why multiplying the output by `scale` is not exact; None if it is."""
    if scale == 1:
        return None
    if recipe.scale_on == "megatron":
        return "scale_on='megatron' also scales what goes through the activation"
    if not math.log2(scale).is_integer() and dtype not in (torch.float32, torch.float64):
        return f"weights scaled by {scale:g}, which is no power of two, are rounded to {str(dtype).removeprefix('torch.')}"
    return None
