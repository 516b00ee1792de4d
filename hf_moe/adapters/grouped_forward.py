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
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .low_rank import LowRank, grouped_mm, grouped_outer


IMPLEMENTATION = "lora_grouped_mm"
ACTIVE = "_hf_moe_active_adapters"  # on an experts module, during a forward pass: `ActiveAdapters` by projection
INPUTS = ("hidden", "weights", "up", "up_bias", "down", "down_bias")  # of `_Experts`, before what differs
SLICES = "trained_experts"  # a module inside the experts, where some of them are fine-tuned: `ExpertSlices`


@dataclass(frozen=True)
class Routing:
    """
    The pairs of tokens and experts, sorted by expert.

    Args:
        order_S (`torch.Tensor`): Where a pair stood among the T * K.
        place_TK (`torch.Tensor`): The reverse: where it stands now.
        token_S (`torch.Tensor`): Its token.
        expert_S (`torch.Tensor`): Its expert.
        offsets_E (`torch.Tensor`): Where the pairs of an expert end.
        elsewhere_S (`torch.Tensor`, *optional*): With expert parallelism, which pairs belong to experts of another device.
    """

    order_S: torch.Tensor
    place_TK: torch.Tensor
    token_S: torch.Tensor
    expert_S: torch.Tensor
    offsets_E: torch.Tensor
    elsewhere_S: torch.Tensor | None

    @classmethod
    def of(cls, experts: nn.Module, top_k_index_TK: torch.Tensor) -> "Routing":
        """Sort the choices of the tokens `(T, K)`."""
        num_experts = experts.num_experts
        expert_S, order_S = torch.sort(top_k_index_TK.reshape(-1), stable=True)
        all_experts = torch.arange(num_experts, device=expert_S.device, dtype=expert_S.dtype)
        offsets_E = torch.searchsorted(expert_S, all_experts, right=True, out_int32=True)
        elsewhere_S = None
        if experts._is_expert_parallel:
            elsewhere_S = expert_S >= num_experts
            expert_S = expert_S.clamp(max=num_experts - 1)
        place_TK = torch.empty_like(order_S)
        place_TK[order_S] = torch.arange(len(order_S), device=order_S.device)
        token_S = order_S // top_k_index_TK.shape[1]
        return cls(order_S, place_TK.view_as(top_k_index_TK), token_S, expert_S, offsets_E, elsewhere_S)

    def to_experts(self, values_TH: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens, for every pair `(S, H)`."""
        return values_TH.index_select(0, self.token_S)

    def weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """The weights of the pairs as a column `(S, 1)`."""
        return weights_TK.reshape(-1, 1).index_select(0, self.order_S)

    def sum_over_experts(self, values_SH: torch.Tensor, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of what the experts of a token give `(T, H)`, weighted or not."""
        if weights_TK is not None and weights_TK.dtype != values_SH.dtype:
            values_SH, weights_TK = values_SH * self.weights(weights_TK), None
        return nn.functional.embedding_bag(self.place_TK, values_SH, mode="sum", per_sample_weights=weights_TK)

    def without_elsewhere(self, values_SX: torch.Tensor) -> torch.Tensor:
        """Zeros for the pairs of other devices, whose rows grouped products leave as they were in memory."""
        return values_SX if self.elsewhere_S is None else values_SX.masked_fill_(self.elsewhere_S[:, None], 0.0)


@dataclass(frozen=True)
class Call:
    """
    What one pass through a layer of experts needs besides tensors that have gradients.

    Args:
        experts (`torch.nn.Module`): The layer.
        routing (`Routing`): None between the passes, where autograd keeps its tensors.
        up (`LowRank`, *optional*): The adapters of the first projection.
        down (`LowRank`, *optional*): Those of the second.
        others (`Sequence[torch.nn.Parameter]`): Parameters of the layer that are no projection: of a gate or norm.
        first_name (`str`): What the first projection is called.
        slices (`ExpertSlices`, *optional*): Its experts that are fine-tuned.
    """

    experts: nn.Module
    routing: Any
    up: LowRank | None
    down: LowRank | None
    others: Sequence[nn.Parameter]
    first_name: str
    slices: Any

    @property
    def factors(self) -> list[torch.Tensor]:
        """Those of the first projection, then those of the second."""
        return [factor for side in (self.up, self.down) if side is not None for factor in side.factors]

    @property
    def slice_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the experts that are fine-tuned, by the name of what they are cut out of."""
        return {} if self.slices is None else dict(self.slices.named_parameters())

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

    def gradient_of_weight(
        self, input_SX: torch.Tensor, gradient_SY: torch.Tensor, offsets_E: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of all experts, or of those that end at `offsets_E`."""
        left, right = (input_SX, gradient_SY) if self.experts.is_transposed else (gradient_SY, input_SX)
        return grouped_outer(left, right, self.routing.offsets_E if offsets_E is None else offsets_E)

    def gradient_of_bias(self, gradient_SY: torch.Tensor) -> torch.Tensor:
        """Of all experts `(E, Y)`."""
        gradient_EY = gradient_SY.new_zeros(self.experts.num_experts, gradient_SY.shape[1])
        return gradient_EY.index_add_(0, self.routing.expert_S, gradient_SY)

    def gradients_of_slices(
        self, projection: str, input_SX: torch.Tensor, gradient_SY: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Of the weight and bias of the experts that are fine-tuned, from the pairs that are theirs alone."""
        rows_C, expert_C, offsets_N = self.slices.pairs(self.routing)
        gradient_CY = gradient_SY.index_select(0, rows_C)
        gradients = {projection: self.gradient_of_weight(input_SX.index_select(0, rows_C), gradient_CY, offsets_N)}
        if self.experts.has_bias:
            gradient_NY = gradient_CY.new_zeros(len(offsets_N), gradient_CY.shape[1])
            gradients[f"{projection}_bias"] = gradient_NY.index_add_(0, expert_C, gradient_CY)
        return gradients


class _Experts(torch.autograd.Function):
    """The layer with its backward pass."""

    @staticmethod
    def forward(ctx, call: Call, hidden_TH, weights_TK, up, up_bias, down, down_bias, *trained):
        experts, routing = call.experts, call.routing
        input_SH = routing.without_elsewhere(routing.to_experts(hidden_TH.to(up.dtype)))
        first_SF = call.linear(input_SH, up, up_bias)
        inner_up = up_b_EOR = None
        if call.up is not None:
            inner_up, up_b_EOR = call.up.add_to(first_SF, input_SH, routing.expert_S, routing.offsets_E)
        del input_SH  # its memory serves for what comes
        first_SF = routing.without_elsewhere(first_SF)
        middle_SI = call.gate(first_SF)
        second_SH = call.linear(middle_SI, down, down_bias)
        inner_down = down_b_EOR = None
        if call.down is not None:
            inner_down, down_b_EOR = call.down.add_to(second_SH, middle_SI, routing.expert_S, routing.offsets_E)
        second_SH = routing.without_elsewhere(second_SH)
        normed_SH = experts.post_expert_norm(second_SH) if experts.has_post_expert_norm else second_SH
        output_TH = routing.sum_over_experts(normed_SH, weights_TK).to(hidden_TH.dtype)
        if inner_down is not None and not experts.has_post_expert_norm:
            inner_down.mul_(routing.weights(weights_TK))  # as the gradient of its factor needs it

        ctx.call = replace(call, routing=None)
        ctx.save_for_backward(
            *(getattr(routing, item.name) for item in fields(routing)),
            hidden_TH,
            weights_TK,
            first_SF,
            inner_up,
            up_b_EOR,
            inner_down,
            down_b_EOR,
            second_SH if experts.has_post_expert_norm else None,
            # A weight that is computed when it is asked for (4 bits in memory) is asked for again instead of kept.
            None if parametrize.is_parametrized(experts, call.first_name) else up,
            None if parametrize.is_parametrized(experts, "down_proj") else down,
            down_bias,
            *call.factors,
            *call.slice_parameters.values(),  # so that backward fails if they were written to in between
        )
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_TH):
        saved = ctx.saved_tensors
        number = len(fields(Routing))
        routing, saved = Routing(*saved[:number]), saved[number:]
        call = replace(ctx.call, routing=routing)
        experts, offsets_E = call.experts, routing.offsets_E
        hidden_TH, weights_TK, first_SF, inner_up, up_b_EOR, inner_down, down_b_EOR, *rest = saved
        second_SH, up, down, down_bias, *factors = rest
        split = len(call.up.factors) if call.up is not None else 0
        up_factors, down_factors = factors[:split], factors[split : len(call.factors)]
        up = getattr(experts, call.first_name) if up is None else up
        down = experts.down_proj if down is None else down
        needs = dict(zip(INPUTS, ctx.needs_input_grad[1:], strict=False))
        weights_S1 = routing.weights(weights_TK)
        others = [parameter for parameter in call.others if parameter.requires_grad]

        # Through the weights of the experts: the gradient of what they are multiplied with is not scaled by them yet where
        # that saves a copy as large as the output.
        gradient_SH = routing.to_experts(gradient_TH)
        scale_S1: torch.Tensor | None = weights_S1
        gradient_of_weights_S = None
        gradients_of_others: list[torch.Tensor | None] = [None] * len(others)
        if second_SH is not None:
            with torch.enable_grad():
                second_SH = second_SH.detach().requires_grad_()
                normed_SH = experts.post_expert_norm(second_SH)
            gradient_of_weights_S = (gradient_SH * normed_SH.detach()).float().sum(dim=-1)
            found = torch.autograd.grad(normed_SH, [second_SH, *others], gradient_SH * weights_S1, allow_unused=True)
            gradient_SH, gradients_of_others = found[0], list(found[1:])
            scale_S1 = None
        gradient_SH = routing.without_elsewhere(gradient_SH.to(down.dtype))

        # Through the second projection.
        with torch.enable_grad():
            first_SF = first_SF.detach().requires_grad_()
            middle = call.gate(first_SF)
        middle_SI = middle.detach()
        gradient_SI = call.gradient_of_input(gradient_SH, down)
        gradient_inner = None
        if call.down is not None:
            gradient_inner = call.down.add_gradient_to(gradient_SI, gradient_SH, down_factors, down_b_EOR, offsets_E)
        gradient_SI = routing.without_elsewhere(gradient_SI)
        if gradient_of_weights_S is None and needs["weights"]:
            # <gradient, W x> = <W' gradient, x>, so that the output need not be kept.
            gradient_of_weights_S = (gradient_SI * middle_SI).sum(dim=-1, dtype=torch.float32)
            if down_bias is not None:
                gradient_of_weights_S += (gradient_SH * down_bias[routing.expert_S]).sum(dim=-1, dtype=torch.float32)
        results: dict[str, torch.Tensor | None] = {}
        of_down_factors: list[torch.Tensor] = []
        if call.down is not None:
            if scale_S1 is not None:
                gradient_inner *= scale_S1
            of_down_factors = call.down.factor_gradients(
                middle_SI, inner_down, gradient_SH, gradient_inner, down_factors, offsets_E
            )
        if scale_S1 is not None:
            gradient_SI *= scale_S1
        of_slices: dict[str, torch.Tensor] = {}
        if needs["down"] or needs["down_bias"] or call.slices is not None:
            scaled_SH = gradient_SH if scale_S1 is None else gradient_SH.mul_(scale_S1)
            results["down"] = call.gradient_of_weight(middle_SI, scaled_SH) if needs["down"] else None
            results["down_bias"] = call.gradient_of_bias(scaled_SH) if needs["down_bias"] else None
            if call.slices is not None:
                of_slices |= call.gradients_of_slices("down_proj", middle_SI, scaled_SH)

        # Through the gate and the first projection.
        found = torch.autograd.grad(middle, [first_SF, *others], gradient_SI, allow_unused=True)
        gradient_SF = found[0]
        gradients_of_others = [_sum(*pair) for pair in zip(gradients_of_others, found[1:], strict=True)]
        gradient_in_SH = call.gradient_of_input(gradient_SF, up)
        gradient_inner = None
        if call.up is not None:
            gradient_inner = call.up.add_gradient_to(gradient_in_SH, gradient_SF, up_factors, up_b_EOR, offsets_E)
        of_up_factors: list[torch.Tensor] = []
        if call.up is not None or needs["up"] or call.slices is not None:
            # Into the memory of a gradient that has done its work.
            input_SH = torch.index_select(hidden_TH.to(up.dtype), 0, routing.token_S, out=gradient_SH)
            input_SH = routing.without_elsewhere(input_SH)
            if call.up is not None:
                of_up_factors = call.up.factor_gradients(
                    input_SH, inner_up, gradient_SF, gradient_inner, up_factors, offsets_E
                )
            if needs["up"]:
                results["up"] = call.gradient_of_weight(input_SH, gradient_SF)
            if call.slices is not None:
                of_slices |= call.gradients_of_slices(call.first_name, input_SH, gradient_SF)
        if needs["up_bias"]:
            results["up_bias"] = call.gradient_of_bias(gradient_SF)

        # Back to the tokens.
        if needs["hidden"]:
            gradient_in_SH = routing.without_elsewhere(gradient_in_SH)
            results["hidden"] = routing.sum_over_experts(gradient_in_SH).to(hidden_TH.dtype)
        if gradient_of_weights_S is not None:
            results["weights"] = gradient_of_weights_S[routing.place_TK].to(weights_TK.dtype)
        trained = iter(gradients_of_others)
        of_slice_parameters = [of_slices[name].to(of.dtype) for name, of in call.slice_parameters.items()]
        of_others = [next(trained) if parameter.requires_grad else None for parameter in call.others]
        return (
            None,
            *(results.get(name) for name in INPUTS),
            *of_others,
            *of_up_factors,
            *of_down_factors,
            *of_slice_parameters,
        )


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
    active = self.__dict__.get(ACTIVE, {})
    slices = getattr(self, SLICES, None)
    if not active and slices is None:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return _forward_with_adapters(self, active, slices, hidden_states, top_k_index, top_k_weights)


@torch.compiler.disable(reason="expert LoRA brings its own backward pass, which cannot be traced")
def _forward_with_adapters(
    self: nn.Module,
    active: dict[str, Any],
    slices: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    if slices is not None:
        slices.write_to(self)
    first_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, first_name), self.down_proj
    up_bias = getattr(self, f"{first_name}_bias") if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    routing = Routing.of(self, top_k_index)
    low_rank = {name: active[name].low_rank(routing, up.dtype) for name in active}
    projections = {id(parameter) for parameter in (up, down, up_bias, down_bias)}
    others = [
        parameter
        for name, parameter in self.named_parameters()
        if id(parameter) not in projections and not name.startswith(f"{SLICES}.")
    ]
    call = Call(self, routing, low_rank.get(first_name), low_rank.get("down_proj"), others, first_name, slices)
    inputs = (hidden_states, top_k_weights, up, up_bias, down, down_bias)
    return _Experts.apply(call, *inputs, *others, *call.factors, *call.slice_parameters.values())


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, lora_experts_forward)
