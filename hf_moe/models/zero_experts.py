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
"""Experts that compute next to nothing (MoE++, LongCat-Flash), behind the feed-forwards in the numbering of a router.

Dimension letters: T tokens, H hidden size, K experts per token, C constant experts.
"""

import torch
from torch import nn
from transformers import initialization as init


class ZeroComputationExperts(nn.Module):
    """
    Constant, copy and zero experts, in this order, after the feed-forwards (https://huggingface.co/papers/2410.07348).

    A constant expert mixes its input with a learned vector, `a_1 x + a_2 v` with `a = softmax(W x)`; a copy expert returns its
    input; a zero expert returns nothing. A token needs no dispatch to any of them.
    """

    def __init__(self, config, num_feed_forwards: int):
        super().__init__()
        self.first = num_feed_forwards
        self.num_constant, self.num_copy = config.num_constant_experts, config.num_copy_experts
        if self.num_constant:
            self.constant = nn.Parameter(torch.empty(self.num_constant, config.hidden_size))
            self.constant_gate = nn.Parameter(torch.empty(self.num_constant, 2, config.hidden_size))

    def init_weights(self, std: float) -> None:
        """Constants are standard normal, as in the paper."""
        if self.num_constant:
            init.normal_(self.constant, mean=0.0, std=1.0)
            init.normal_(self.constant_gate, mean=0.0, std=std)

    def forward(
        self, hidden_states_TH: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """`(T, H)` in the data type of the weights."""
        is_copy_TK = (top_k_index_TK >= self.first + self.num_constant) & (
            top_k_index_TK < self.first + self.num_constant + self.num_copy
        )
        output_TH = (top_k_weights_TK * is_copy_TK).sum(-1, keepdim=True) * hidden_states_TH
        for place in range(self.num_constant):
            weight_T1 = (top_k_weights_TK * (top_k_index_TK == self.first + place)).sum(-1, keepdim=True)
            mix_T2 = nn.functional.linear(hidden_states_TH, self.constant_gate[place]).softmax(-1)
            constant_TH = mix_T2[:, :1] * hidden_states_TH + mix_T2[:, 1:] * self.constant[place]
            output_TH = output_TH + weight_T1 * constant_TH
        return output_TH
