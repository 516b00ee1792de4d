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

`MoeExperts`, `BiasedMoeExperts` and `UngatedMoeExperts` run through transformers' experts interface, so `eager`,
`batched_mm`, `grouped_mm` and the kernels apply. `SharedExpert` is the feed-forward that every token takes.

Dimension letters: T tokens, H hidden size, I intermediate size of one expert, E experts, K experts per token, N tokens
routed to one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


class _Experts(nn.Module):
    """What the experts' classes share; which tensors there are is said by the decorator of each."""

    gets_filled_slots = False  # whether a row is a slot that has an expert, of whichever token, and not a token

    def __init__(self, config, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        # CODEPATH: Switch drops out here in fine-tuning; for gated experts it is the same as on the product with `up`
        if config.expert_dropout:
            self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(config.expert_dropout))
        up, up_dim = (
            ("gate_up_proj", 2 * self.intermediate_dim) if config.gated_experts else ("up_proj", self.intermediate_dim)
        )
        self.register_parameter(up, nn.Parameter(torch.empty(num_experts, up_dim, self.hidden_dim)))
        if config.biased_experts:
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(num_experts, up_dim)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.hidden_dim, self.intermediate_dim))
        if config.biased_experts:
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, self.hidden_dim))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # The eager implementation, and the reference for the others: one expert after the other, summed in float32.
        up_name = "gate_up_proj" if self.has_gate else "up_proj"
        up_proj = getattr(self, up_name)
        up_bias = getattr(self, f"{up_name}_bias") if self.has_bias else [None] * self.num_experts
        down_bias = self.down_proj_bias if self.has_bias else [None] * self.num_experts
        output_TH = torch.zeros(hidden_states.shape, dtype=top_k_weights.dtype, device=hidden_states.device)
        for expert in range(self.num_experts):
            token_N, slot_N = torch.where(top_k_index == expert)
            up_N = F.linear(hidden_states[token_N], up_proj[expert], up_bias[expert])
            hidden_NI = self._apply_gate(up_N) if self.has_gate else self.act_fn(up_N)
            expert_output_NH = F.linear(hidden_NI, self.down_proj[expert], down_bias[expert])
            weighted_NH = expert_output_NH * top_k_weights[token_N, slot_N, None]
            output_TH = output_TH.index_add(0, token_N, weighted_NH.to(output_TH.dtype))
        return output_TH.to(hidden_states.dtype)


@use_experts_implementation
class MoeExperts(_Experts):
    """
    E gated feed-forwards: `gate_up_proj` is `(E, 2 * I, H)` with the gate rows first, `down_proj` is `(E, H, I)`.

    The order in which the two are registered is part of the contract with PEFT, whose file format implies it.
    """


@use_experts_implementation(has_bias=True)
class BiasedMoeExperts(_Experts):
    """[`MoeExperts`] with `gate_up_proj_bias` `(E, 2 * I)` and `down_proj_bias` `(E, H)`."""


@use_experts_implementation(has_gate=False, has_bias=True)
class UngatedMoeExperts(_Experts):
    """
    E feed-forwards `down(act(up(x)))` with biases: `up_proj` `(E, I, H)`, `up_proj_bias` `(E, I)`, `down_proj` `(E, H, I)`
    and `down_proj_bias` `(E, H)`.
    """


def build_experts(config, num_experts: int) -> _Experts:
    """The experts that a configuration asks for."""
    if not config.gated_experts:
        return UngatedMoeExperts(config, num_experts)
    return BiasedMoeExperts(config, num_experts) if config.biased_experts else MoeExperts(config, num_experts)


class SharedExpert(nn.Module):
    """The feed-forward of width `config.shared_expert_intermediate_size` that every token takes."""

    def __init__(self, config):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.shared_expert_intermediate_size
        bias = config.biased_experts
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if config.gated_experts else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        hidden = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return self.down_proj(hidden)
