# SPDX-License-Identifier: Apache-2.0
"""
The forward and backward pass of a layer of experts with LoRA on its activations: `lora_grouped_mm`.

It is an experts implementation of transformers, registered beside `grouped_mm`. Where no adapter is active it is that. The
backward pass is written out, so that it keeps less than autograd would: of the activations only what goes into the gate, and
the low-rank ones; the rest is computed again from these.

Shape suffixes: T tokens, K experts per token, S = T * K pairs sorted by expert, E experts, H hidden size, F output of the
first projection (twice I with a gate), I intermediate size, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .low_rank import LowRank, grouped_mm, grouped_outer


IMPLEMENTATION = "lora_grouped_mm"
ACTIVE = "_hf_moe_active_adapters"  # on an experts module, during a forward pass: `ActiveAdapters` by projection


@dataclass(frozen=True)
class Routing:
    """
    The pairs of tokens and experts, sorted by expert.

    Args:
        order_S (`torch.Tensor`): Where a pair stood among the T * K.
        expert_S (`torch.Tensor`): Its expert.
        offsets_E (`torch.Tensor`): Where the pairs of an expert end.
        elsewhere_S (`torch.Tensor`, *optional*): With expert parallelism, which pairs belong to experts of another device.
        top_k (`int`): K.
    """

    order_S: torch.Tensor
    expert_S: torch.Tensor
    offsets_E: torch.Tensor
    elsewhere_S: torch.Tensor | None
    top_k: int

    @classmethod
    def of(cls, experts: nn.Module, top_k_index_TK: torch.Tensor) -> "Routing":
        num_experts = experts.num_experts
        expert_S, order_S = torch.sort(top_k_index_TK.reshape(-1), stable=True)
        all_experts = torch.arange(num_experts, device=expert_S.device, dtype=expert_S.dtype)
        offsets_E = torch.searchsorted(expert_S, all_experts, right=True, out_int32=True)
        elsewhere_S = None
        if experts._is_expert_parallel:
            elsewhere_S = expert_S >= num_experts
            expert_S = expert_S.clamp(max=num_experts - 1)
        return cls(order_S, expert_S, offsets_E, elsewhere_S, top_k_index_TK.shape[-1])

    @property
    def token_S(self) -> torch.Tensor:
        return self.order_S // self.top_k

    def sum_over_experts(self, values_SH: torch.Tensor) -> torch.Tensor:
        """The sum of what the experts of a token give `(T, H)`."""
        unsorted_SH = torch.empty_like(values_SH)
        unsorted_SH[self.order_S] = values_SH
        return unsorted_SH.unflatten(0, (-1, self.top_k)).sum(dim=1)

    def without_elsewhere(self, values_SX: torch.Tensor) -> torch.Tensor:
        """Zeros for the pairs of other devices, whose rows grouped products leave as they were in memory."""
        return values_SX if self.elsewhere_S is None else values_SX.masked_fill_(self.elsewhere_S[:, None], 0.0)


@dataclass(frozen=True)
class Call:
    """What one pass through a layer of experts needs besides tensors that have gradients."""

    experts: nn.Module
    routing: Routing
    up: LowRank | None
    down: LowRank | None
    others: Sequence[nn.Parameter]
    first_name: str

    def gate(self, values_SF: torch.Tensor) -> torch.Tensor:
        """What the second projection gets `(S, I)`."""
        experts: Any = self.experts
        return experts._apply_gate(values_SF) if experts.has_gate else experts.act_fn(values_SF)

    def linear(self, input_SX: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Every row times the weight of its expert, whichever way that is stored."""
        if not self.experts.is_transposed:
            weight = weight.transpose(1, 2)
        output_SY = grouped_mm(input_SX, weight, self.routing.offsets_E)
        return output_SY if bias is None else output_SY.add_(bias[self.routing.expert_S])

    def gradient_of_input(self, gradient_SY: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        if self.experts.is_transposed:
            weight = weight.transpose(1, 2)
        return grouped_mm(gradient_SY, weight, self.routing.offsets_E)

    def gradient_of_weight(self, input_SX: torch.Tensor, gradient_SY: torch.Tensor) -> torch.Tensor:
        left, right = (input_SX, gradient_SY) if self.experts.is_transposed else (gradient_SY, input_SX)
        return grouped_outer(left, right, self.routing.offsets_E)

    def gradient_of_bias(self, gradient_SY: torch.Tensor) -> torch.Tensor:
        gradient_EY = gradient_SY.new_zeros(self.experts.num_experts, gradient_SY.shape[1])
        return gradient_EY.index_add_(0, self.routing.expert_S, gradient_SY)


class _Experts(torch.autograd.Function):
    """The layer with its backward pass."""

    @staticmethod
    def forward(ctx, call: Call, hidden_TH, weights_TK, up, up_bias, down, down_bias, *trained):
        experts, routing = call.experts, call.routing
        input_SH = routing.without_elsewhere(hidden_TH[routing.token_S].to(up.dtype))
        first_SF = call.linear(input_SH, up, up_bias)
        inner_up = None if call.up is None else call.up.add_to(first_SF, input_SH, routing.offsets_E)
        first_SF = routing.without_elsewhere(first_SF)
        middle_SI = call.gate(first_SF)
        second_SH = call.linear(middle_SI, down, down_bias)
        inner_down = None if call.down is None else call.down.add_to(second_SH, middle_SI, routing.offsets_E)
        second_SH = routing.without_elsewhere(second_SH)
        normed_SH = experts.post_expert_norm(second_SH) if experts.has_post_expert_norm else second_SH
        weights_S = weights_TK.reshape(-1)[routing.order_S]
        output_TH = routing.sum_over_experts(normed_SH * weights_S[:, None]).to(hidden_TH.dtype)

        ctx.call = call
        ctx.save_for_backward(
            hidden_TH,
            weights_TK,
            first_SF,
            inner_up,
            inner_down,
            second_SH if experts.has_post_expert_norm else None,
            # A weight that is computed when it is asked for (4 bits in memory) is asked for again instead of kept.
            None if parametrize.is_parametrized(experts, call.first_name) else up,
            None if parametrize.is_parametrized(experts, "down_proj") else down,
            down_bias,
        )
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_TH):
        call = ctx.call
        experts, routing, offsets_E = call.experts, call.routing, call.routing.offsets_E
        hidden_TH, weights_TK, first_SF, inner_up, inner_down, second_SH, up, down, down_bias = ctx.saved_tensors
        up = getattr(experts, call.first_name) if up is None else up
        down = experts.down_proj if down is None else down
        needs = dict(zip(INPUTS, ctx.needs_input_grad[1:], strict=False))
        weights_S = weights_TK.reshape(-1)[routing.order_S]
        others = [parameter for parameter in call.others if parameter.requires_grad]

        # Through the weights of the experts: the gradient of what they are multiplied with is not scaled by them yet where
        # that saves a copy as large as the output.
        gradient_SH = gradient_TH[routing.token_S]
        scale_S = weights_S.to(down.dtype)
        gradient_of_weights_S = None
        gradients_of_others: list[torch.Tensor | None] = [None] * len(others)
        if second_SH is not None:
            with torch.enable_grad():
                second_SH = second_SH.detach().requires_grad_()
                normed_SH = experts.post_expert_norm(second_SH)
            gradient_of_weights_S = (gradient_SH * normed_SH.detach()).float().sum(dim=-1)
            found = torch.autograd.grad(
                normed_SH, [second_SH, *others], gradient_SH * weights_S[:, None], allow_unused=True
            )
            gradient_SH, gradients_of_others = found[0], list(found[1:])
            scale_S = None
        gradient_SH = routing.without_elsewhere(gradient_SH.to(down.dtype))

        # Through the second projection.
        with torch.enable_grad():
            first_SF = first_SF.detach().requires_grad_()
            middle = call.gate(first_SF)
        middle_SI = middle.detach()
        gradient_SI = call.gradient_of_input(gradient_SH, down)
        gradient_inner = None
        if call.down is not None:
            gradient_inner = call.down.add_gradient_to(gradient_SI, gradient_SH, offsets_E)
        gradient_SI = routing.without_elsewhere(gradient_SI)
        if gradient_of_weights_S is None and needs["weights"]:
            # <gradient, W x> = <W' gradient, x>, so that the output need not be kept.
            gradient_of_weights_S = (gradient_SI * middle_SI).sum(dim=-1, dtype=torch.float32)
            if down_bias is not None:
                gradient_of_weights_S += (gradient_SH * down_bias[routing.expert_S]).sum(dim=-1, dtype=torch.float32)
        results: dict[str, torch.Tensor | None] = {}
        down_factors: list[torch.Tensor] = []
        if call.down is not None:
            inner, outer = inner_down, gradient_inner
            if scale_S is not None:
                inner, outer = inner * scale_S[:, None], outer * scale_S[:, None]
            down_factors = call.down.factor_gradients(middle_SI, inner, gradient_SH, outer, offsets_E)
        if scale_S is not None:
            gradient_SI *= scale_S[:, None]
        if needs["down"] or needs["down_bias"]:
            scaled_SH = gradient_SH if scale_S is None else gradient_SH * scale_S[:, None]
            results["down"] = call.gradient_of_weight(middle_SI, scaled_SH) if needs["down"] else None
            results["down_bias"] = call.gradient_of_bias(scaled_SH) if needs["down_bias"] else None

        # Through the gate and the first projection.
        found = torch.autograd.grad(middle, [first_SF, *others], gradient_SI, allow_unused=True)
        gradient_SF = found[0]
        gradients_of_others = [_sum(*pair) for pair in zip(gradients_of_others, found[1:], strict=True)]
        gradient_in_SH = call.gradient_of_input(gradient_SF, up)
        gradient_inner = None
        if call.up is not None:
            gradient_inner = call.up.add_gradient_to(gradient_in_SH, gradient_SF, offsets_E)
        up_factors: list[torch.Tensor] = []
        if call.up is not None or needs["up"]:
            input_SH = routing.without_elsewhere(hidden_TH[routing.token_S].to(up.dtype))
            if call.up is not None:
                up_factors = call.up.factor_gradients(input_SH, inner_up, gradient_SF, gradient_inner, offsets_E)
            if needs["up"]:
                results["up"] = call.gradient_of_weight(input_SH, gradient_SF)
        if needs["up_bias"]:
            results["up_bias"] = call.gradient_of_bias(gradient_SF)

        # Back to the tokens.
        if needs["hidden"]:
            gradient_in_SH = routing.without_elsewhere(gradient_in_SH)
            results["hidden"] = routing.sum_over_experts(gradient_in_SH).to(hidden_TH.dtype)
        if gradient_of_weights_S is not None:
            of_weights = torch.zeros_like(weights_TK).view(-1)
            of_weights[routing.order_S] = gradient_of_weights_S.to(weights_TK.dtype)
            results["weights"] = of_weights.view_as(weights_TK)
        trained = iter(gradients_of_others)
        of_others = [next(trained) if parameter.requires_grad else None for parameter in call.others]
        return None, *(results.get(name) for name in INPUTS), *of_others, *up_factors, *down_factors


INPUTS = ("hidden", "weights", "up", "up_bias", "down", "down_bias")


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def lora_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts implementation `"lora_grouped_mm"`.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, H)`): The tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Their experts.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): What these count.

    Returns:
        `torch.Tensor` of shape `(T, H)`
    """
    active = self.__dict__.get(ACTIVE)
    if not active:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    first_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, first_name), self.down_proj
    up_bias = getattr(self, f"{first_name}_bias") if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    routing = Routing.of(self, top_k_index)
    low_rank = {name: active[name].low_rank(routing, up.dtype) for name in active}
    projections = {id(parameter) for parameter in (up, down, up_bias, down_bias)}
    others = [parameter for parameter in self.parameters() if id(parameter) not in projections]
    call = Call(self, routing, low_rank.get(first_name), low_rank.get("down_proj"), others, first_name)
    factors = [
        factor
        for side in (call.up, call.down)
        if side is not None
        for adapter in side.adapters
        for factor in (adapter.lora_a, adapter.lora_b)
    ]
    return _Experts.apply(call, hidden_states, top_k_weights, up, up_bias, down, down_bias, *others, *factors)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, lora_experts_forward)
