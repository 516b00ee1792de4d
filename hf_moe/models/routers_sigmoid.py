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
"""Routers that score every expert for itself: `sigmoid_topk`, `llama4` and `relu`.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token, G groups.
"""

import torch

from .losses import count_choices, scores_of, sequence_loss, sparsity_loss
from .router_base import (
    CAPACITY_OPTIONS,
    ZERO_EXPERT_OPTIONS,
    MoeRouter,
    RouterContract,
    TopKRouter,
    at_least_float32,
)
from .routing_context import Tokens


class SigmoidTopKRouter(TopKRouter):
    """DeepSeek-V3: sigmoid scores, a bias that only chooses, groups of which the best are looked at."""

    contract = RouterContract(
        system="DeepSeek-V3, DeepSeek-R1",
        papers=("2412.19437", "2408.15664"),
        score="sigmoid(W x)",
        selection="the K largest scores plus bias, in the `topk_group` of `n_group` groups with the largest sum of their two best",
        weight="the score, divided by the sum of the K with `norm_topk_prob`, times `routed_scaling_factor`; on the output",
        balance="DeepSeek-V3's, within every sequence, minimum 1",
        state="`e_score_correction_bias` with `use_expert_bias`, moved by `BiasBalancingCallback`",
        use_when="many small experts, balanced by the bias rather than a loss; groups bound how many devices a token visits",
    )
    score = "sigmoid"
    options = (
        *CAPACITY_OPTIONS,
        *ZERO_EXPERT_OPTIONS,
        "norm_topk_prob",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "router_residual",
        "use_expert_bias",
        "num_experts_per_modality",
    )

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return at_least_float32(logits_TE).sigmoid()

    def score_of_group(self, scores_TGE: torch.Tensor) -> torch.Tensor:
        return scores_TGE.topk(min(2, scores_TGE.shape[-1]), dim=-1).values.sum(-1)

    def divided_by_sum(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)  # with logits below -100 all are 0

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        return config.norm_topk_prob

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        if self.num_zero_computation_experts:
            return super().balance_loss(hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens)
        scores_TE = scores_of(router_logits_TE, self.score)
        return sequence_loss(scores_TE, top_k_index_TK, tokens.batch_size, tokens.mask_T)


class Llama4Router(MoeRouter):
    """Llama 4: the K largest logits, whose sigmoid multiplies what the expert gets."""

    contract = RouterContract(
        system="Llama 4",
        papers=(),
        score="sigmoid(W x)",
        selection="the K largest logits",
        weight="the score, on the INPUT of the expert",
        balance="Switch's, minimum 1 (the model has none)",
        state="`e_score_correction_bias` with `use_expert_bias`",
        use_when="top-1 of many experts beside a shared expert, in every second layer: `mlp_layer_types`",
    )
    score = "sigmoid"
    options = (*CAPACITY_OPTIONS, "router_dtype", "use_expert_bias", "num_experts_per_modality")
    float32_logits = False
    weighs_input = True

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.float32_logits = config.router_dtype == "float32"

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        top_k_logits_TK, top_k_index_TK = self.largest(logits_TE, self.for_choice(logits_TE))
        return at_least_float32(top_k_logits_TK).sigmoid(), top_k_index_TK


class ReluRouter(MoeRouter):
    """ReMoE: every expert whose logit is positive, weighted with it; fully differentiable."""

    contract = RouterContract(
        system="ReMoE",
        papers=("2412.14711",),
        score="relu(W x)",
        selection="all experts with a positive score",
        weight="the score, on the output",
        balance="ReMoE's L1 loss weighted by the load; `LoadBalancingCallback('sparsity')` finds its coefficient, so that a token "
        "gets `num_experts_per_tok` experts in the mean",
        use_when="training from scratch, where a router without jumps pays; the number of experts differs by token and layer",
    )
    score = "relu"
    options = (*CAPACITY_OPTIONS, *ZERO_EXPERT_OPTIONS, "router_residual", "num_experts_per_modality")
    has_variable_top_k = True
    unreplayable_because = "it selects by a threshold"

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        weights_TE = at_least_float32(logits_TE).relu()
        index_TE = torch.arange(self.num_experts, device=logits_TE.device).expand(weights_TE.shape)
        return weights_TE, index_TE.masked_fill(weights_TE == 0, self.num_experts)

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        counts_E = count_choices(top_k_index_TK, self.num_experts, tokens.mask_T)
        return sparsity_loss(top_k_weights_TK, counts_E, self.top_k, tokens.mask_T)
