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
"""Routers that see the experts in groups: `prototypes`, `grouped` and `hierarchical`. Groups are consecutive experts.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token, G groups, M experts of a group.
"""

import torch
from torch import nn
from transformers import initialization as init

from .losses import group_divergence_loss
from .router_base import CAPACITY_OPTIONS, MoeRouter, RouterContract, at_least_float32, divided_by_sum, float32_softmax
from .routers_noisy import refuse_uneven_groups
from .routing_context import Tokens


class PrototypesRouter(MoeRouter):
    """M6-T: the experts are divided into K prototypes, and each of them routes to one of its own."""

    contract = RouterContract(
        system="M6-T",
        papers=("2105.15082",),
        score="softmax(W x) in each of K groups of E / K experts",
        selection="the largest in each group",
        weight="the score, on the output",
        balance="Switch's, with the scores of a group divided by K, minimum 1 (the paper found that it does harm)",
        use_when="top-k without a sort over all experts: k cheap top-1 choices",
    )
    score = "softmax"
    has_z_loss = False
    options = CAPACITY_OPTIONS
    unreplayable_because = "it selects experts by their place in a group"
    divides_by_top_k = True

    @property
    def sizes_of_parts(self) -> list[int]:
        return [self.num_experts // self.top_k] * self.top_k

    @staticmethod
    def validate(config) -> None:
        _refuse_remainder(config, "num_experts_per_tok", config.num_experts_per_tok)

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        logits_TGM = super().compute_logits(hidden_states_TH, tokens).unflatten(-1, (self.top_k, -1))
        return logits_TGM.log_softmax(-1).flatten(-2)

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TGM = logits_TE.exp().unflatten(-1, (self.top_k, -1))
        weights_TK, in_group_TK = scores_TGM.max(-1)
        return weights_TK, in_group_TK + _first_of_groups(self.top_k, self.num_experts, in_group_TK)


class GroupedRouter(MoeRouter):
    """Pangu Pro MoE: as many experts in every group, so that groups on different devices have equal work."""

    contract = RouterContract(
        system="Pangu Pro MoE (MoGE)",
        papers=("2505.21411",),
        score="softmax(W x) over all experts",
        selection="the K / G largest in each of the G = `n_group` groups",
        weight="the score times `router_scale` of the expert, on the output",
        balance="Switch's, minimum 1; groups are balanced by construction",
        state="`router_scale`; `e_score_correction_bias` with `use_expert_bias`",
        use_when="expert parallelism: with a group per device all devices always have the same work",
    )
    score = "softmax"
    options = (*CAPACITY_OPTIONS, "n_group", "use_expert_bias")
    unreplayable_because = "it selects experts by their place in a group"

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.num_groups = config.n_group
        self.router_scale = nn.Parameter(torch.empty(self.num_experts))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.ones_(self.router_scale)

    @property
    def sizes_of_parts(self) -> list[int]:
        return [self.num_experts // self.num_groups] * self.num_groups

    @staticmethod
    def validate(config) -> None:
        if config.n_group == 1 or config.num_experts_per_tok % config.n_group:
            raise ValueError(
                f"router_type='grouped' chooses as many experts in every group: `n_group` must be at least 2 and divide "
                f"`num_experts_per_tok` ({config.num_experts_per_tok}), got {config.n_group}."
            )

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = float32_softmax(logits_TE)
        in_group_TGM = self.for_choice(scores_TE).unflatten(-1, (self.num_groups, -1))
        index_TGM = torch.topk(in_group_TGM, self.top_k // self.num_groups, dim=-1).indices
        first_G1 = _first_of_groups(self.num_groups, self.num_experts, index_TGM)[:, None]
        top_k_index_TK = (index_TGM + first_G1).flatten(-2)
        return scores_TE.gather(-1, top_k_index_TK) * at_least_float32(self.router_scale)[
            top_k_index_TK
        ], top_k_index_TK


class HierarchicalRouter(MoeRouter):
    """
    Two stages: a softmax over groups, then one over the experts of each chosen group.

    The weight keeps the probability of the group. With a single group and weights divided by their sum it would cancel, and
    the first stage would learn nothing.
    """

    contract = RouterContract(
        system="CAS framework",
        papers=("2510.02345",),
        score="p(g) p(i | g) = softmax(U x) softmax(W_g x)",
        selection="the `topk_group` likeliest of `n_group` groups, the K / `topk_group` likeliest in each",
        weight="p(g) p(i | g), divided by the sum of the K with `norm_topk_prob`; on the output",
        balance="divergence of the groups' mean probability from an even load, divided by G, minimum 0",
        state="`group_weight`",
        use_when="experts that share a basis per group, and many experts",
    )
    score = "softmax"
    holds_besides_rows = "a row for each group of experts"
    has_z_loss = False
    options = (*CAPACITY_OPTIONS, "norm_topk_prob", "n_group", "topk_group")
    chooses_parts = True
    unreplayable_because = "it selects experts by their place in a group"

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.num_groups, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.group_weight = nn.Parameter(torch.empty(self.num_groups, config.hidden_size))

    @property
    def sizes_of_parts(self) -> list[int]:
        return [self.num_experts // self.num_groups] * self.num_groups

    @staticmethod
    def validate(config) -> None:
        refuse_uneven_groups(config)
        if config.n_group == 1:
            raise ValueError(
                "router_type='hierarchical' needs `n_group`, the number of groups, to be at least 2, got 1."
            )
        if config.norm_topk_prob and config.topk_group == 1:
            raise ValueError(
                "router_type='hierarchical' with one group per token (`topk_group=1`) needs `norm_topk_prob=False`: the probability of "
                "the group would cancel, and the choice of groups would get no gradient. Or set `topk_group` to 2 or more."
            )

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        return 1.0 if config.norm_topk_prob else None

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        group_TG1 = self.linear(hidden_states_TH, self.group_weight).log_softmax(-1)[..., None]
        in_group_TGM = super().compute_logits(hidden_states_TH, tokens).unflatten(-1, (self.num_groups, -1))
        return (group_TG1 + in_group_TGM.log_softmax(-1)).flatten(-2)

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        joint_TGM = logits_TE.exp().unflatten(-1, (self.num_groups, -1))
        group_index_TG = torch.topk(joint_TGM.sum(-1), self.topk_group, dim=-1).indices
        size = joint_TGM.shape[-1]
        of_groups_TGM = joint_TGM.gather(1, group_index_TG[..., None].expand(-1, -1, size))
        weights_TGM, index_TGM = torch.topk(of_groups_TGM, self.top_k // self.topk_group, dim=-1)
        weights_TK = weights_TGM.flatten(-2)
        weights_TK = divided_by_sum(weights_TK) if self.norm_topk_prob else weights_TK
        return weights_TK, (index_TGM + group_index_TG[..., None] * size).flatten(-2)

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        scores_TG = router_logits_TE.exp().unflatten(-1, (self.num_groups, -1)).sum(-1)
        return group_divergence_loss(scores_TG, tokens.mask_T)


def _first_of_groups(num_groups: int, num_experts: int, like: torch.Tensor) -> torch.Tensor:
    """`(G,)`: the first expert of every group."""
    return torch.arange(0, num_experts, num_experts // num_groups, dtype=like.dtype, device=like.device)


def _refuse_remainder(config, field: str, divisor: int) -> None:
    for count in config.counts_of_experts:
        if count % divisor:
            raise ValueError(
                f"router_type={config.router_type!r} divides the experts into `{field}` equal parts: the number of experts of every layer "
                f"({count}) must be a multiple of `{field}` ({divisor})."
            )
