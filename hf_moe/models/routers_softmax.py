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
"""Routers whose scores are a softmax over all experts: `soft`, `softmax_topk`, `normalized_logits`, `attention`, `top_p`
and `modality`.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token, G groups.
"""

import torch
from torch import nn

from .losses import entropy_loss, scores_of, squared_deviation_loss
from .router_base import (
    CAPACITY_OPTIONS,
    ZERO_EXPERT_OPTIONS,
    MoeRouter,
    RouterContract,
    TopKRouter,
    float32_softmax,
)
from .routing_context import Tokens


MIN_STD = 1e-6  # of logits that are brought to a standard deviation
ENTROPY_RATIO = 1e-2  # the coefficient of dynamic routing's entropy, relative to that of its balance loss


class SoftRouter(MoeRouter):
    """Every expert serves every token: the mixture of 1991, and what each sparse router is at K = E."""

    contract = RouterContract(
        system="Jacobs, Jordan, Nowlan and Hinton, Neural Computation 3 (1991)",
        papers=(),
        score="softmax(W x)",
        selection="all experts: `num_experts_per_tok` must be their number",
        weight="the score, on the output",
        balance="none: nothing is chosen",
        use_when="a reference for sparse routers, or a few small experts that shall all learn from every token",
    )
    score = "softmax"
    ranks_all_experts = True
    options: tuple[str, ...] = (*ZERO_EXPERT_OPTIONS, "router_residual")
    chooses_all = True
    unreplayable_because = "it takes all experts"
    has_balance_loss = False

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        return 1.0

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        return True

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = float32_softmax(logits_TE)
        return scores_TE, torch.arange(self.num_experts, device=logits_TE.device).expand(scores_TE.shape)


class SoftmaxTopKRouter(TopKRouter):
    """Softmax over all experts, then the K largest: Mixtral, Qwen-MoE, Grok-1 and DeepSeekMoE."""

    contract = RouterContract(
        system="Mixtral, Qwen1.5-MoE, Grok-1, DeepSeekMoE",
        papers=("2401.04088", "2401.06066"),
        score="softmax(W x)",
        selection="the K largest scores, plus a bias with `use_expert_bias`; of the best groups with `n_group`",
        weight="the score, divided by the sum of the K with `norm_topk_prob`, times `routed_scaling_factor`; on the output",
        balance="Mixtral's, minimum K",
        state="`e_score_correction_bias` with `use_expert_bias`",
        use_when="the default; with `norm_topk_prob` upcycling by copies is exact",
    )
    score = "softmax"
    options: tuple[str, ...] = (
        *CAPACITY_OPTIONS,
        *ZERO_EXPERT_OPTIONS,
        "norm_topk_prob",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "router_dtype",
        "router_residual",
        "use_expert_bias",
        "num_experts_per_modality",
    )
    float32_logits = False
    has_mixtral_loss = True

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        # CODEPATH: float32 Grok-1, DeepSeek-V2; the model's data type Mixtral, Qwen-MoE
        self.float32_logits = config.router_dtype == "float32"

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        return not config.use_expert_bias  # to which scores of more experts would be smaller

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return float32_softmax(logits_TE)


class ModalityRouter(SoftmaxTopKRouter):
    """[`SoftmaxTopKRouter`] in which text and every other modality have experts of their own."""

    contract = RouterContract(
        system="VLMo, ERNIE 4.5 VL",
        papers=("2111.02358",),
        score="softmax(W x) over the experts of the token's modality",
        selection="the K largest scores",
        weight="the score, divided by the sum of the K with `norm_topk_prob`; on the output",
        balance="Switch's, minimum 1 with as many tokens of each modality as it has experts",
        state="`e_score_correction_bias` with `use_expert_bias`",
        use_when="inputs of several modalities that should not compete for experts; `mm_token_type_ids` names them",
    )
    options = tuple(
        option for option in SoftmaxTopKRouter.options if option not in ("n_group", "topk_group", "router_residual")
    )
    requires = ("modality_T",)
    ranks_all_experts = False
    has_mixtral_loss = False

    @staticmethod
    def validate(config) -> None:
        if config.num_experts_per_modality is None:
            raise ValueError(
                "router_type='modality' needs `num_experts_per_modality`: how many of the experts are for text, for the next "
                f"modality and so on, such as [{config.num_experts // 2}, {config.num_experts - config.num_experts // 2}]."
            )


class NormalizedLogitsRouter(SoftmaxTopKRouter):
    """Skywork-MoE: the logits of a token are brought to mean 0 and standard deviation `router_logit_scale` first."""

    contract = RouterContract(
        system="Skywork-MoE",
        papers=("2406.06563",),
        score="softmax(λ (z - mean(z)) / std(z)), z = W x, λ `router_logit_scale`, std unbiased",
        selection="the K largest scores",
        weight="the score, divided by the sum of the K with `norm_topk_prob`; on the output",
        balance="Skywork's squared deviation from an even load, minimum 0",
        state="`e_score_correction_bias` with `use_expert_bias`",
        use_when="routers whose scores are nearly even: λ sets how much the best expert stands out",
    )
    options: tuple[str, ...] = (
        *CAPACITY_OPTIONS,
        *ZERO_EXPERT_OPTIONS,
        "norm_topk_prob",
        "router_logit_scale",
        "use_expert_bias",
    )
    has_mixtral_loss = False

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.float32_logits = True
        self.scale = config.router_logit_scale

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        return False  # the standard deviation of more logits is another one

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        logits_TE = super().compute_logits(hidden_states_TH, tokens)
        centered_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
        std_T1 = centered_TE.std(-1, keepdim=True)
        # Where all logits tie there is nothing to stretch, and dividing would only make their gradient a million times as large.
        return self.scale * centered_TE / torch.where(std_T1 > MIN_STD, std_T1, 1.0)

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        if self.num_zero_computation_experts:
            return super().balance_loss(hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens)
        return squared_deviation_loss(scores_of(router_logits_TE, self.score), tokens.mask_T)


class AttentionRouter(SoftmaxTopKRouter):
    """
    Yuan 2.0-M32's attention router, which lets the experts' scores depend on each other.

    A token has a query, a key and a value for each expert; expert i gets `sum_j softmax_j(q_i k_j) v_j`. `weight` holds the
    rows of the values.
    """

    contract = RouterContract(
        system="Yuan 2.0-M32",
        papers=("2405.17976",),
        score="softmax(P), P_i = Σ_j softmax_j(q_i k_j) v_j with q, k, v = W_q x, W_k x, W_v x",
        selection="the K largest scores",
        weight="the score, divided by the sum of the K with `norm_topk_prob`; on the output",
        balance="Switch's, minimum 1 (the paper has none)",
        state="`query`, `key`; `e_score_correction_bias` with `use_expert_bias`",
        use_when="experts whose usefulness depends on which others are there; three times the router's parameters",
    )
    options: tuple[str, ...] = (*CAPACITY_OPTIONS, *ZERO_EXPERT_OPTIONS, "norm_topk_prob", "use_expert_bias")
    ties_at_zero_rows = True
    has_mixtral_loss = False

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.float32_logits = True
        self.query = nn.Parameter(torch.empty_like(self.weight))
        self.key = nn.Parameter(torch.empty_like(self.weight))

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        query_TE, key_TE, value_TE = (
            self.linear(hidden_states_TH, weight) for weight in (self.query, self.key, self.weight)
        )
        attention_TEE = torch.softmax(query_TE[:, :, None] * key_TE[:, None, :], dim=-1)
        return (attention_TEE * value_TE[:, None, :]).sum(-1)  # no matrix product, which autocast would round


class TopPRouter(MoeRouter):
    """Dynamic routing: as many experts as it takes for their scores to sum to more than `router_top_p`."""

    contract = RouterContract(
        system="Dynamic-MoE",
        papers=("2403.07652",),
        score="softmax(W x)",
        selection="the smallest number of the largest scores whose sum exceeds `router_top_p`",
        weight="the score, on the output",
        balance="Switch's, minimum 1, plus 0.01 times the entropy of the scores, minimum 0",
        use_when="texts whose tokens are not equally hard; `num_experts_per_tok` is the mean that plans and capacities count with",
    )
    score = "softmax"
    options: tuple[str, ...] = (
        *CAPACITY_OPTIONS,
        *ZERO_EXPERT_OPTIONS,
        "router_top_p",
        "router_residual",
        "num_experts_per_modality",
    )
    unreplayable_because = "it returns not all that it selects"
    has_variable_top_k = True

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.top_p = config.router_top_p

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE, index_TE = float32_softmax(logits_TE).sort(dim=-1, descending=True)
        before_TE = scores_TE.cumsum(dim=-1) - scores_TE
        is_beyond_TE = (before_TE > self.top_p) | (scores_TE == 0)
        return scores_TE.masked_fill(is_beyond_TE, 0.0), index_TE.masked_fill(is_beyond_TE, self.num_experts)

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        balance = super().balance_loss(hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens)
        return balance + ENTROPY_RATIO * entropy_loss(scores_of(router_logits_TE, self.score), tokens.mask_T)
