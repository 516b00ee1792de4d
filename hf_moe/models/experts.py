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
"""The experts of one layer as two fused tensors, and the shared expert beside them.

`MoeExperts` runs through transformers' experts interface, so `eager`, `batched_mm`, `grouped_mm` and the kernels apply.
`SharedExpert` is the feed-forward that every token takes.

Dimension letters: T tokens, H hidden size, I intermediate size of one expert, E experts, K experts per token, N tokens
routed to one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


@use_experts_implementation
class MoeExperts(nn.Module):
    """
    E gated feed-forwards: `gate_up_proj` is `(E, 2 * I, H)` with the gate rows first, `down_proj` is `(E, H, I)`.

    The order in which the two are registered is part of the contract with PEFT, whose file format implies it.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # The eager implementation, and the reference for the others: one expert after the other, summed in float32.
        output_TH = torch.zeros(hidden_states.shape, dtype=top_k_weights.dtype, device=hidden_states.device)
        for expert in range(self.num_experts):
            token_N, slot_N = torch.where(top_k_index == expert)
            gate_up_N = F.linear(hidden_states[token_N], self.gate_up_proj[expert])
            expert_output_NH = F.linear(self._apply_gate(gate_up_N), self.down_proj[expert])
            weighted_NH = expert_output_NH * top_k_weights[token_N, slot_N, None]
            output_TH = output_TH.index_add(0, token_N, weighted_NH.to(output_TH.dtype))
        return output_TH.to(hidden_states.dtype)


class SharedExpert(nn.Module):
    """The gated feed-forward of width `config.shared_expert_intermediate_size` that every token takes."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.shared_expert_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.shared_expert_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.shared_expert_intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
