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
"""The base class of the routers, and what each of them declares about itself.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token, G groups.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .losses import count_choices, heterogeneous_loss, scores_of, switch_loss
from .routing_context import Tokens


@dataclass(frozen=True)
class RouterContract:
    """
    What a router does, in the words of the guide.

    Args:
        system (`str`): The model or the paper that it comes from.
        papers (`tuple[str, ...]`): Their numbers, for `https://huggingface.co/papers/<number>`.
        score (`str`): What it makes of a token.
        selection (`str`): Which experts it chooses.
        weight (`str`): The routing weight, and where it is applied.
        training_differs (`str`): What training does that evaluation does not.
        balance (`str`): The loss that `aux_loss` is, with its smallest value.
        state (`str`): Buffers and parameters besides `weight`.
        use_when (`str`): What it is good for.
    """

    system: str
    papers: tuple[str, ...]
    score: str
    selection: str
    weight: str
    balance: str
    use_when: str
    training_differs: str = "no"
    state: str = "none"


CAPACITY_OPTIONS = ("capacity_policy", "capacity_factor", "eval_capacity_factor", "min_capacity", "capacity_group")
ZERO_EXPERT_OPTIONS = ("num_zero_experts", "num_copy_experts", "num_constant_experts", "zero_expert_tau")


class MoeRouter(nn.Module, ABC):
    """
    Base class of the routers.

    A router maps hidden states of shape `(..., H)` to the tuple `(router_logits, top_k_weights, top_k_index)` of shapes
    `(T, E)`, `(T, K)` and `(T, K)`. The weights are float32 and stay so until the experts' outputs are summed: rounding
    them to bfloat16 first would let K equal experts differ from the one they were copied from. A slot that takes no
    expert has index `num_experts` and weight 0. Zero-computation experts are the last of the E.

    A subclass chooses from logits in [`~MoeRouter.choose`]; one whose logits are not linear has a
    [`~MoeRouter.compute_logits`] too. Dropping tokens beyond a capacity is not the router's business.
    """

    contract: RouterContract
    score: str  # what it makes of its logits, one of `SCORES`
    options: tuple[str, ...] = ()  # fields of the configuration that it reads
    requires: tuple[str, ...] = ()  # what it must know of the tokens, fields of `Tokens`
    capacity_policy = "none"  # unless the configuration names one
    queues_by_choice = False  # whether all first choices stand in the queue before the second ones
    float32_logits = True  # whether the logits are computed in float32, whatever the model's data type
    weighs_input = False  # whether the weight multiplies the expert's input and not its output
    has_variable_top_k = False  # whether K is an upper bound, of which most slots are empty
    jitters_block = True  # whether `router_jitter_noise` disturbs the experts' input too
    decides_alone = True  # whether a token's experts do not depend on other tokens
    divides_by_top_k = False  # whether it divides the experts into as many groups as a token gets experts
    has_rows = True  # whether it has a row of weights for every expert
    ties_at_zero_rows = (
        False  # whether its logits tie where `weight` is zero, and learn only if what else it has is not
    )
    holds_besides_rows: str | None = None  # what it has that would not fit other numbers of experts
    fixed_top_k: int | None = None  # the only `num_experts_per_tok` there is
    chooses_all = False  # whether a token gets all experts
    ranks_all_experts = False  # whether a token gets the K largest of all scores, if there are no groups
    has_z_loss = True  # whether its logits can be too large: log-probabilities have a logsumexp of their own
    has_noise = False  # whether training adds noise to the logits; then it has a `smooth_load_loss`
    has_balance_loss = True
    has_mixtral_loss = False  # whether `aux_loss` is Mixtral's, which takes all layers together
    unreplayable_because: str | None = None  # unless it returns what it selects last, where others can be put
    chooses_parts = False  # whether it chooses among the parts of `sizes_of_parts` too, and not the input or all alike

    def __init__(self, config, num_experts: int):
        super().__init__()
        self.num_zero_computation_experts = config.num_zero_computation_experts
        self.num_experts = num_experts + self.num_zero_computation_experts
        self.zero_expert_tau = config.zero_expert_tau
        self.leaves_slots_empty = self.has_variable_top_k
        self.divides_after_dropping = (
            False  # whether the block divides the weights that a capacity leaves by their sum
        )
        self.top_k = config.num_experts_per_tok
        self.weight = self.build_weight(config)
        # CODEPATH: DeepSeek-V3 has one, Mixtral and Qwen-MoE have none
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if config.use_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        # CODEPATH: MoE++ has it, the others have not
        residual = torch.empty(self.num_experts, self.num_experts) if config.router_residual else None
        self.residual_weight = None if residual is None else nn.Parameter(residual)
        self.experts_per_modality = config.num_experts_per_modality

    @property
    def is_even_in_sequences(self) -> bool:
        """Whether all experts have the same load in every sequence, whatever the router learns."""
        return self.chooses_all

    @property
    def sizes_of_parts(self) -> list[int]:
        """How many consecutive experts each part has in which they compete for tokens, and not with those of other parts."""
        return self.experts_per_modality or [self.num_experts]

    def build_weight(self, config) -> nn.Parameter | None:
        """`(E, H)`"""
        return nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def init_weights(self, std: float) -> None:
        """Initialise parameters and buffers; `std` is the configuration's `initializer_range`."""
        for name, parameter in self.named_parameters(recurse=False):
            if name == "residual_weight":  # at first nothing comes from the layer before
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Follow the model when it gets another number of token ids."""

    @staticmethod
    def validate(config) -> None:
        """Raise a `ValueError` if the configuration asks for what the router cannot do."""

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        """What the weights of a token sum to, None if that depends on the token."""
        return None

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        """Whether, with every expert there n times and n times as many chosen, the copies have one expert's weight together."""
        return False

    @staticmethod
    def count_domains(config) -> int:
        """How many values `domain_ids` may have; 1 if the router does not ask for them."""
        return 1

    def forward(
        self, hidden_states: torch.Tensor, tokens: Tokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits_TE = self.compute_logits(hidden_states_TH, tokens)
        top_k_weights_TK, top_k_index_TK = self.choose(router_logits_TE, tokens)
        if tokens is not None and tokens.wants_balance_loss:
            tokens.balance_loss = self.balance_loss(
                hidden_states_TH, router_logits_TE, top_k_weights_TK, top_k_index_TK, tokens
            )
        return router_logits_TE, top_k_weights_TK, top_k_index_TK

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        """`(T, E)`"""
        logits_TE = self.linear(hidden_states_TH, self.weight)
        if self.residual_weight is not None and tokens is not None and tokens.previous_logits_TE is not None:
            logits_TE = logits_TE + self.linear(tokens.previous_logits_TE, self.residual_weight)
        return logits_TE if self.experts_per_modality is None else self._of_modality(logits_TE, tokens)

    @abstractmethod
    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, K)` weights and `(T, K)` experts."""

    def balance_loss(
        self,
        hidden_states_TH: torch.Tensor,
        router_logits_TE: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        tokens: Tokens,
    ) -> torch.Tensor:
        """
        The loss that the contract names, of one pass: Switch's, minimum 1, unless a subclass has another.

        With zero-computation experts it is the heterogeneous one of MoE++.
        """
        counts_E = count_choices(top_k_index_TK, self.num_experts, tokens.mask_T)
        scores_TE = scores_of(router_logits_TE, self.score)
        if self.num_zero_computation_experts:
            num_feed_forwards = self.num_experts - self.num_zero_computation_experts
            return heterogeneous_loss(scores_TE, counts_E, num_feed_forwards, self.zero_expert_tau, tokens.mask_T)
        return switch_loss(scores_TE, counts_E, tokens.mask_T)

    def linear(self, hidden_states_TH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A product in float32, also under autocast, if the class asks for that."""
        if not self.float32_logits:
            return F.linear(hidden_states_TH, weight)
        device_type = hidden_states_TH.device.type
        with torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext():
            return F.linear(at_least_float32(hidden_states_TH), at_least_float32(weight))

    def largest(self, scores_TE: torch.Tensor, for_choice_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores and the places of the K that are the largest ones for the choice."""
        if for_choice_TE is scores_TE:
            return torch.topk(scores_TE, self.top_k, dim=-1)
        index_TK = torch.topk(for_choice_TE, self.top_k, dim=-1).indices
        return scores_TE.gather(-1, index_TK), index_TK

    def for_choice(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """The scores plus the selection bias if there is one."""
        return scores_TE if self.e_score_correction_bias is None else scores_TE + self.e_score_correction_bias

    def _of_modality(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        if tokens is None or tokens.modality_T is None:
            modality_T = torch.zeros(len(logits_TE), dtype=torch.long, device=logits_TE.device)
        else:
            modality_T = tokens.modality_T.clamp(max=len(self.experts_per_modality) - 1)
        parts = logits_TE.split(self.experts_per_modality, dim=-1)
        own = [part.masked_fill((modality_T != place)[:, None], -torch.inf) for place, part in enumerate(parts)]
        return torch.cat(own, dim=-1)


class TopKRouter(MoeRouter):
    """
    The K experts with the largest scores, of all or of those in the best groups.

    A subclass says what the scores are and how good they make a group.
    """

    ranks_all_experts = True

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.num_groups, self.topk_group = config.n_group, config.topk_group

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        return config.routed_scaling_factor if config.norm_topk_prob else None

    @abstractmethod
    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """`(T, E)`, in float32 at least."""

    def score_of_group(self, scores_TGE: torch.Tensor) -> torch.Tensor:
        """`(T, G)` of the scores of `E / G` experts: that of the best one."""
        return scores_TGE.amax(-1)

    def divided_by_sum(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weights of which those of a token sum to 1."""
        return divided_by_sum(weights_TK)

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = self.scores(logits_TE)
        for_choice_TE = self.for_choice(scores_TE)
        if self.num_groups > 1:
            score_of_group_TG = self.score_of_group(for_choice_TE.unflatten(-1, (self.num_groups, -1)))
            is_in_best_TE = in_best_groups(score_of_group_TG, self.topk_group, self.num_experts)
            for_choice_TE = for_choice_TE.masked_fill(~is_in_best_TE, -torch.inf)
        elif self.experts_per_modality is not None:
            for_choice_TE = for_choice_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)
        top_k_weights_TK, top_k_index_TK = self.largest(scores_TE, for_choice_TE)
        if self.norm_topk_prob:
            top_k_weights_TK = self.divided_by_sum(top_k_weights_TK)
        if self.routed_scaling_factor != 1.0:
            top_k_weights_TK = top_k_weights_TK * self.routed_scaling_factor
        return top_k_weights_TK, top_k_index_TK


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def float32_softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension, in float32 at least."""
    return F.softmax(at_least_float32(logits_TE), dim=-1)


def divided_by_sum(weights_TK: torch.Tensor) -> torch.Tensor:
    """Weights of which those of a token sum to 1."""
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True)


def in_best_groups(score_of_group_TG: torch.Tensor, topk_group: int, num_experts: int) -> torch.Tensor:
    """`(T, E)`: whether the expert is in one of the `topk_group` groups with the largest scores."""
    best_TG = torch.topk(score_of_group_TG, topk_group, dim=-1, sorted=False).indices
    is_best_TG = torch.zeros_like(score_of_group_TG, dtype=torch.bool).scatter_(-1, best_TG, True)
    return is_best_TG.repeat_interleave(num_experts // score_of_group_TG.shape[-1], dim=-1)
