# Copyright 2026 The hf_moe authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The sparse block: a router, the experts it chooses from, and what may stand beside them.

Dimension letters: B sequences, S tokens of a sequence, T tokens (B * S), H hidden size, E experts, K experts per token,
N slots (T * K) or those of them that have an expert.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .capacity import ExpertCapacity
from .experts import SharedExpert, build_experts
from .routers import build_router
from .routing_context import RoutingContext
from .zero_experts import ZeroComputationExperts


class MoeSparseBlock(nn.Module):
    """
    Router, routed experts and an optional shared expert: `(B, S, H)` to `(B, S, H)`.

    The tensor names (`gate.weight`, `experts.gate_up_proj`, `experts.down_proj`, `shared_expert`) are those that PEFT,
    TRL, quantizers and the parallel plans of transformers look for.
    """

    def __init__(self, config, num_experts: int, layer_index: int = 0):
        super().__init__()
        router_class = config.router_class
        self.layer_index = layer_index
        self.num_experts = num_experts  # feed-forwards; with expert parallelism `experts` holds some of them
        self.jitter_noise = config.router_jitter_noise if router_class.jitters_block else 0.0
        self.gate = build_router(config, num_experts, layer_index)
        self.capacity = None
        # CODEPATH: with a capacity Switch and GShard, without Mixtral and DeepSeek
        if config.has_capacity:
            self.capacity = ExpertCapacity(
                config, self.gate.num_experts, router_class.score, router_class.queues_by_choice
            )
        self.experts = build_experts(config, num_experts)
        self.zero_experts = None
        # CODEPATH: with zero-computation experts MoE++ and LongCat-Flash, without all others
        if config.num_zero_computation_experts:
            self.zero_experts = ZeroComputationExperts(config, num_experts)
        # CODEPATH: with a shared expert DeepSeekMoE and Qwen2-MoE, without Mixtral and Qwen3-MoE
        self.shared_expert = SharedExpert(config) if config.shared_expert_intermediate_size else None
        hidden_size = config.hidden_size
        # CODEPATH: gated Qwen2-MoE, ungated DeepSeekMoE
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if config.use_shared_expert_gate else None
        self.weighs_input = router_class.weighs_input
        # A slot may be empty, so that only the others are worth computing.
        has_other_slots = self.capacity is not None or self.zero_experts is not None
        self.has_empty_slots = has_other_slots or self.gate.leaves_slots_empty
        self.experts.gets_filled_slots = self.has_empty_slots
        self.divides_after_dropping = self.gate.divides_after_dropping
        self.needs = config.routing_needs
        self.routing: RoutingContext | None = None  # of the forward pass at hand

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            hidden_states = hidden_states * noise
        hidden_states_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k_weights_TK, top_k_index_TK = self.route(hidden_states)
        output_TH = self._run_experts(hidden_states_TH, top_k_index_TK, top_k_weights_TK)
        if self.shared_expert is not None:
            shared_output_TH = self.shared_expert(hidden_states_TH)
            if self.shared_expert_gate is not None:
                shared_output_TH = F.sigmoid(self.shared_expert_gate(hidden_states_TH)) * shared_output_TH
            output_TH = output_TH + shared_output_TH
        return output_TH.reshape(hidden_states.shape)

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, K)` weights and `(T, K)` experts, after what a capacity drops."""
        if not self.needs and self.routing is None:
            _, top_k_weights_TK, top_k_index_TK = self.gate(hidden_states.reshape(-1, hidden_states.shape[-1]))
        else:
            top_k_weights_TK, top_k_index_TK = self._route_with_context(hidden_states)
        return self.after_dropping(top_k_weights_TK), top_k_index_TK

    def after_dropping(self, top_k_weights_TK: torch.Tensor) -> torch.Tensor:
        """The weights that a capacity has left, divided by their sum if the router wants that."""
        if not self.divides_after_dropping:
            return top_k_weights_TK
        sums_T1 = top_k_weights_TK.sum(dim=-1, keepdim=True)
        return top_k_weights_TK / sums_T1.clamp(min=torch.finfo(sums_T1.dtype).eps)

    def _route_with_context(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing, self.routing = self.routing or RoutingContext(), None
        needs = self.needs
        if self.capacity is not None and self.capacity.current_factor is None:
            needs = needs - {"mask_T"}  # padding takes no room from anybody
        tokens = routing.tokens(hidden_states, self.layer_index, needs)
        hidden_states_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits_TE, top_k_weights_TK, top_k_index_TK = self.gate(hidden_states_TH, tokens)
        if "previous_logits_TE" in self.needs:
            routing.keep_logits(self.layer_index, router_logits_TE)
        if tokens.balance_loss is not None:
            routing.balance_losses[self.layer_index] = tokens.balance_loss
        if self.capacity is not None:
            top_k_weights_TK, top_k_index_TK = self.capacity(
                router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens
            )
        return top_k_weights_TK, top_k_index_TK

    def _run_experts(
        self, hidden_states_TH: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        if self.has_empty_slots:
            output_TH = self._run_filled_slots(hidden_states_TH, top_k_index_TK, top_k_weights_TK)
        elif self.weighs_input:
            top_k = top_k_index_TK.shape[-1]
            inputs_NH = hidden_states_TH.repeat_interleave(top_k, dim=0) * top_k_weights_TK.reshape(-1, 1)
            ones_N1 = torch.ones_like(top_k_weights_TK).reshape(-1, 1)
            outputs_NH = self.experts(inputs_NH.to(hidden_states_TH.dtype), top_k_index_TK.reshape(-1, 1), ones_N1)
            output_TH = outputs_NH.unflatten(0, (-1, top_k)).sum(1)
        else:
            return self.experts(hidden_states_TH, top_k_index_TK, top_k_weights_TK)
        if self.zero_experts is not None:
            output_TH = output_TH + self.zero_experts(hidden_states_TH, top_k_index_TK, top_k_weights_TK)
        return output_TH.to(hidden_states_TH.dtype)

    def _run_filled_slots(
        self, hidden_states_TH: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Each slot that has an expert as a token of its own. Which are empty is asked of the device once."""
        token_N, slot_N = (top_k_index_TK < self.num_experts).nonzero(as_tuple=True)
        weights_N1 = top_k_weights_TK[token_N, slot_N, None]
        ones_N1, inputs_NH = torch.ones_like(weights_N1), hidden_states_TH[token_N]
        if self.weighs_input:
            inputs_NH, weights_N1 = (inputs_NH * weights_N1).to(inputs_NH.dtype), ones_N1
        outputs_NH = self.experts(inputs_NH, top_k_index_TK[token_N, slot_N, None], ones_N1)
        output_TH = torch.zeros(hidden_states_TH.shape, dtype=weights_N1.dtype, device=hidden_states_TH.device)
        return output_TH.index_add(0, token_N, outputs_NH * weights_N1)
