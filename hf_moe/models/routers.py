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
"""Routers: which experts serve a token, and with what weight.

`MoeRouter` is the base class that recorders and initialisers look for, `SoftmaxTopKRouter` the router of Mixtral and
Qwen-MoE, and `ROUTERS` the table from `config.router_type` to a class.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import nn


class MoeRouter(nn.Module):
    """
    Base class of the routers.

    A router maps hidden states of shape `(..., H)` to the tuple `(router_logits, top_k_weights, top_k_index)` of shapes
    `(T, E)`, `(T, K)` and `(T, K)`. The weights are float32 and stay so until the experts' outputs are summed: rounding
    them to bfloat16 first would let K equal experts differ from the one they were copied from. A slot that takes no
    expert has index `num_experts` and weight 0. `score` says what a subclass makes of its logits.
    """

    score: str

    def __init__(self, config, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        # CODEPATH: DeepSeek-V3 has one, Mixtral and Qwen-MoE have none
        bias = torch.zeros(num_experts, dtype=torch.float32) if config.use_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)


class SoftmaxTopKRouter(MoeRouter):
    """
    Softmax over all experts, then the K largest (https://huggingface.co/papers/2401.04088).

    | | |
    |---|---|
    | score | `softmax(W x)` in float32 |
    | selection | the K largest scores; with `use_expert_bias` of the scores plus a bias (https://huggingface.co/papers/2408.15664) |
    | weight | the score, divided by the sum of the K scores when `norm_topk_prob`; applied to the expert's output |
    | training differs | no (`router_jitter_noise` belongs to the block: it disturbs the experts' input too) |
    | capacity | none, no token is dropped |
    | balance loss | Switch's, minimum K |
    | state buffers | `e_score_correction_bias` with `use_expert_bias` |
    """

    score = "softmax"

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits_TE = F.linear(hidden_states_TH, self.weight)
        scores_TE = F.softmax(router_logits_TE, dim=-1, dtype=torch.float32)
        if self.e_score_correction_bias is None:
            top_k_weights_TK, top_k_index_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        else:
            top_k_index_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k, dim=-1).indices
            top_k_weights_TK = scores_TE.gather(-1, top_k_index_TK)
        if self.norm_topk_prob:
            top_k_weights_TK = top_k_weights_TK / top_k_weights_TK.sum(dim=-1, keepdim=True)
        return router_logits_TE, top_k_weights_TK, top_k_index_TK


ROUTERS: dict[str, type[MoeRouter]] = {"softmax_topk": SoftmaxTopKRouter}
