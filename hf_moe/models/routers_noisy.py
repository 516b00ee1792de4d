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
"""The routers of the first sparse systems, which differ in training: `noisy_topk`, `hierarchical_noisy_topk`, `gshard` and
`switch`.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token, G groups, M experts of a group.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .losses import importance_loss, load_loss, load_probabilities, masked_mean, squared_variation
from .router_base import (
    CAPACITY_OPTIONS,
    ZERO_EXPERT_OPTIONS,
    MoeRouter,
    RouterContract,
    at_least_float32,
    divided_by_sum,
    float32_softmax,
)
from .routing_context import Tokens


NOISE_EPSILON = 1e-2  # the smallest standard deviation of the noise
SECOND_EXPERT_POLICIES = ("all", "sampling", "random")


class NoisyTopKRouter(MoeRouter):
    """The sparsely-gated layer of 2017: in training, noise of a learned size is added to the logits."""

    contract = RouterContract(
        system="Sparsely-Gated MoE",
        papers=("1701.06538",),
        score="W x + ε (softplus(W_n x) + 0.01), ε standard normal",
        selection="the K largest",
        weight="softmax over the K, on the output",
        training_differs="the noise; the load is a part of the balance loss",
        balance="squared variation of importance, and in training of the smooth load, minimum 0",
        state="`noise_weight`; with `weight` it starts at 0",
        use_when="routers that should look around by themselves, in particular such as start without a preference",
    )
    score = "softmax"
    ranks_all_experts = True
    options: tuple[str, ...] = (*CAPACITY_OPTIONS, *ZERO_EXPERT_OPTIONS)
    has_noise = True

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    def init_weights(self, std: float) -> None:
        for parameter in self.parameters():
            init.zeros_(parameter)

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        return 1.0

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        return True  # but for the noise of training

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        return self.with_noise(hidden_states_TH, self.weight, self.noise_weight)

    def with_noise(
        self, hidden_states_TH: torch.Tensor, weight: torch.Tensor, noise_weight: torch.Tensor
    ) -> torch.Tensor:
        """The logits, in training with noise."""
        logits_TE = self.linear(hidden_states_TH, weight)
        if not self.training:
            return logits_TE
        return logits_TE + torch.randn_like(logits_TE) * self.noise_std(hidden_states_TH, noise_weight)

    def noise_std(self, hidden_states_TH: torch.Tensor, noise_weight: torch.Tensor) -> torch.Tensor:
        """The standard deviation of the noise, of the shape of the logits."""
        return F.softplus(self.linear(hidden_states_TH, noise_weight)) + NOISE_EPSILON

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        top_k_logits_TK, top_k_index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        return float32_softmax(top_k_logits_TK), top_k_index_TK

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        weights_TE = torch.zeros_like(router_logits_TE).scatter(-1, top_k_index_TK, top_k_weights_TK)
        loss = importance_loss(weights_TE, tokens.mask_T)
        if not self.training or self.top_k == self.num_experts:
            return loss
        return loss + self.smooth_load_loss(hidden_states_TH, router_logits_TE, tokens.mask_T)

    def smooth_load_loss(
        self, hidden_states_TH: torch.Tensor, router_logits_TE: torch.Tensor, mask_T: torch.Tensor | None
    ) -> torch.Tensor:
        """[`~hf_moe.models.losses.load_loss`] of the noise that was drawn, from what the router got and returned."""
        clean_TE = self.linear(hidden_states_TH, self.weight)
        std_TE = self.noise_std(hidden_states_TH, self.noise_weight)
        return load_loss(clean_TE, self.top_k, std_TE, mask_T, noisy_logits_TE=router_logits_TE)


class HierarchicalNoisyTopKRouter(NoisyTopKRouter):
    """The two-level variant: a noisy choice of groups, in each of them a noisy choice of experts, weights multiplied."""

    contract = RouterContract(
        system="Sparsely-Gated MoE, hierarchical",
        papers=("1701.06538",),
        score="noisy logits of `n_group` groups, and of the experts in each",
        selection="`topk_group` groups, the K / `topk_group` largest in each of them",
        weight="softmax over the chosen groups times softmax over the chosen of the group, on the output",
        training_differs="the noise; the load is a part of the balance loss",
        balance="squared variation of importance, and in training of the smooth load, minimum 0",
        state="`noise_weight`, `group_weight`, `group_noise_weight`; all start at 0 with `weight`",
        use_when="hundreds of experts and more",
    )
    options: tuple[str, ...] = (*CAPACITY_OPTIONS, "n_group", "topk_group")
    holds_besides_rows = "a row for each group of experts"
    has_z_loss = False
    ranks_all_experts = False
    chooses_parts = True
    unreplayable_because = "it selects experts by their place in a group"

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.num_groups, self.topk_group = config.n_group, config.topk_group
        self.top_k_in_group = config.num_experts_per_tok // config.topk_group
        self.group_weight = nn.Parameter(torch.empty(self.num_groups, config.hidden_size))
        self.group_noise_weight = nn.Parameter(torch.empty_like(self.group_weight))

    @property
    def sizes_of_parts(self) -> list[int]:
        return [self.num_experts // self.num_groups] * self.num_groups

    @staticmethod
    def validate(config) -> None:
        refuse_uneven_groups(config)

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        group_TG = self.with_noise(hidden_states_TH, self.group_weight, self.group_noise_weight)
        in_group_TGM = super().compute_logits(hidden_states_TH, tokens).unflatten(-1, (self.num_groups, -1))
        return (group_TG.log_softmax(-1)[..., None] + in_group_TGM.log_softmax(-1)).flatten(-2)

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        joint_TGM = logits_TE.unflatten(-1, (self.num_groups, -1))
        group_TG = joint_TGM.logsumexp(-1)
        top_group_TG, group_index_TG = torch.topk(group_TG, self.topk_group, dim=-1)
        size = joint_TGM.shape[-1]
        of_groups_TGM = joint_TGM.gather(1, group_index_TG[..., None].expand(-1, -1, size))
        top_in_group_TGM, index_TGM = torch.topk(of_groups_TGM, self.top_k_in_group, dim=-1)
        weights_TGM = float32_softmax(top_group_TG)[..., None] * float32_softmax(top_in_group_TGM)
        return weights_TGM.flatten(-2), (index_TGM + group_index_TG[..., None] * size).flatten(-2)

    def smooth_load_loss(
        self, hidden_states_TH: torch.Tensor, router_logits_TE: torch.Tensor, mask_T: torch.Tensor | None
    ) -> torch.Tensor:
        """The variation of the groups' loads times the share of a group's tokens that its experts get, all with new noise."""
        clean_TG = self.linear(hidden_states_TH, self.group_weight)
        clean_TGM = self.linear(hidden_states_TH, self.weight).unflatten(-1, (self.num_groups, -1))
        std_TG = self.noise_std(hidden_states_TH, self.group_noise_weight)
        std_TGM = self.noise_std(hidden_states_TH, self.noise_weight).view_as(clean_TGM)
        noisy_TG = clean_TG + torch.randn_like(clean_TG) * std_TG
        noisy_TGM = clean_TGM + torch.randn_like(clean_TGM) * std_TGM
        probability_TG = _probability_of_choice(clean_TG, self.topk_group, std_TG, noisy_TG)
        probability_TGM = _probability_of_choice(clean_TGM, self.top_k_in_group, std_TGM, noisy_TGM)
        chosen_TG = torch.zeros_like(clean_TG).scatter(-1, noisy_TG.topk(self.topk_group, dim=-1).indices, 1.0)
        share_GM = torch.stack(
            [
                masked_mean(chosen_T1 * of_group_TM, mask_T) / masked_mean(chosen_T1, mask_T).clamp(min=1e-10)
                for chosen_T1, of_group_TM in zip(chosen_TG.split(1, -1), probability_TGM.unbind(1), strict=True)
            ]
        )
        return squared_variation((masked_mean(probability_TG, mask_T)[:, None] * share_GM).flatten())


def _probability_of_choice(
    clean: torch.Tensor, top_k: int, noise_std: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """[`~hf_moe.models.losses.load_probabilities`], which is 1 where everything is chosen."""
    return torch.ones_like(clean) if top_k == clean.shape[-1] else load_probabilities(clean, top_k, noise_std, noisy)


class GShardRouter(MoeRouter):
    """GShard and NLLB-MoE: two experts, the second one by chance in training."""

    contract = RouterContract(
        system="GShard, NLLB-MoE",
        papers=("2006.16668", "2207.04672"),
        score="softmax(W x)",
        selection="the two largest (`num_experts_per_tok` must be 2); in training the second one as `second_expert_policy` says: `all`, `sampling` with Gumbel noise "
        "among the others, `random` with probability 2 p",
        weight="the score, divided by the sum of the two: of those kept, or before any is dropped with "
        "`normalize_router_prob_before_dropping`; on the output",
        training_differs="the second expert; the capacity",
        balance="Switch's of the first choices, minimum 1",
        use_when="top-2 with a fixed capacity; `capacity_group` makes the local groups",
    )
    score = "softmax"
    options: tuple[str, ...] = (
        *CAPACITY_OPTIONS,
        *ZERO_EXPERT_OPTIONS,
        "second_expert_policy",
        "normalize_router_prob_before_dropping",
        "num_experts_per_modality",
    )
    capacity_policy = "position"
    fixed_top_k = 2
    queues_by_choice = True

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.second_expert_policy = config.second_expert_policy
        self.normalizes_before_dropping = config.normalize_router_prob_before_dropping
        self.divides_after_dropping = not self.normalizes_before_dropping
        self.leaves_slots_empty = config.second_expert_policy == "random"
        if config.second_expert_policy != "all":
            policy = config.second_expert_policy
            self.unreplayable_because = (
                f"it draws lots for the second expert, with `second_expert_policy={policy!r}` instead of 'all'"
            )

    @staticmethod
    def validate(config) -> None:
        if config.second_expert_policy not in SECOND_EXPERT_POLICIES:
            raise ValueError(
                f"`second_expert_policy` must be one of {list(SECOND_EXPERT_POLICIES)}, got {config.second_expert_policy!r}."
            )

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        return 1.0

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = float32_softmax(logits_TE)
        if self.training and self.second_expert_policy == "sampling":
            first_T1 = scores_TE.argmax(-1, keepdim=True)
            gumbel_TE = -torch.empty_like(scores_TE).exponential_().log()
            others_TE = (at_least_float32(logits_TE) + gumbel_TE).scatter(-1, first_T1, -torch.inf)
            top_2_index_TK = torch.cat([first_T1, others_TE.argmax(-1, keepdim=True)], dim=-1)
        else:
            top_2_index_TK = torch.topk(scores_TE, 2, dim=-1).indices
        scores_TK = scores_TE.gather(-1, top_2_index_TK)
        weights_TK = divided_by_sum(scores_TK) if self.normalizes_before_dropping else scores_TK
        if self.training and self.second_expert_policy == "random":
            is_left_out_T = 2 * scores_TK[:, 1] <= torch.rand_like(scores_TK[:, 1])
            is_left_out_TK = torch.stack([torch.zeros_like(is_left_out_T), is_left_out_T], dim=-1)
            weights_TK = weights_TK.masked_fill(is_left_out_TK, 0.0)
            top_2_index_TK = top_2_index_TK.masked_fill(is_left_out_TK, self.num_experts)
        return weights_TK, top_2_index_TK

    def balance_loss(self, hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens: Tokens):
        first_T1 = top_k_index_TK[:, :1]
        return super().balance_loss(hidden_states_TH, router_logits_TE, top_k_weights_TK[:, :1], first_T1, tokens)


class SwitchRouter(MoeRouter):
    """Switch Transformer: one expert, routed in float32 whatever the model computes in."""

    contract = RouterContract(
        system="Switch Transformer",
        papers=("2101.03961",),
        score="softmax(W x); in training x is multiplied by noise from 1 - `router_jitter_noise` to 1 + `router_jitter_noise`",
        selection="the largest: `num_experts_per_tok` must be 1",
        weight="the score, on the output",
        training_differs="the jitter; the capacity; `expert_dropout`",
        balance="Switch's, minimum 1",
        state="`weight` starts truncated normal with standard deviation √(0.1 / H)",
        use_when="the cheapest sparse layer: one expert per token",
    )
    score = "softmax"
    options: tuple[str, ...] = (*CAPACITY_OPTIONS, *ZERO_EXPERT_OPTIONS, "num_experts_per_modality")
    capacity_policy = "position"
    fixed_top_k = 1
    jitters_block = False

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.jitter_noise = config.router_jitter_noise
        self.init_scale = 0.1 if config.moe_initializer_scale is None else config.moe_initializer_scale

    def init_weights(self, std: float) -> None:
        init_truncated_normal(self.weight, self.init_scale)

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        if self.training and self.jitter_noise > 0:
            hidden_states_TH = at_least_float32(hidden_states_TH)
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            hidden_states_TH = hidden_states_TH * torch.empty_like(hidden_states_TH).uniform_(low, high)
        return super().compute_logits(hidden_states_TH, tokens)

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        return float32_softmax(logits_TE).max(dim=-1, keepdim=True)


def init_truncated_normal(tensor: torch.Tensor, scale: float) -> None:
    """Switch's initialisation: normal with variance `scale / fan_in`, values beyond two standard deviations drawn again."""
    std = math.sqrt(scale / tensor.shape[-1])
    init.trunc_normal_(tensor, mean=0.0, std=std, a=-2 * std, b=2 * std)


def refuse_uneven_groups(config) -> None:
    """For routers that choose as many experts in each of some groups."""
    if config.num_experts_per_tok % config.topk_group:
        raise ValueError(
            f"`num_experts_per_tok` ({config.num_experts_per_tok}) must be a multiple of `topk_group` ({config.topk_group}): "
            f"router_type={config.router_type!r} chooses as many experts in each of these groups."
        )
    in_group = config.num_experts // config.n_group
    if config.num_experts_per_tok // config.topk_group > in_group:
        raise ValueError(
            f"A group has {in_group} experts (`num_experts` / `n_group`), fewer than the "
            f"{config.num_experts_per_tok // config.topk_group} that are to be chosen in it (`num_experts_per_tok` / `topk_group`)."
        )
