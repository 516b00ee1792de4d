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
"""Routers that do not let a token choose: `hash`, a fixed table by token id, and `expert_choice`, where experts choose.

Dimension letters: T tokens (batch * sequence), H hidden size, E experts, K experts per token, V token ids, D domains,
B groups of tokens, S tokens of a group, C tokens that one expert takes of a group.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .router_base import MoeRouter, RouterContract, float32_softmax
from .routing_context import Tokens


class HashRouter(MoeRouter):
    """
    PanGu-Σ's random routing: the domain of a text names a group of experts, the token id K of them in a fixed table.

    The table is drawn once for every layer and saved with the model. Every domain deals the token ids out evenly to its
    `num_experts / num_hash_domains` experts.
    """

    contract = RouterContract(
        system="PanGu-Σ, Hash layers",
        papers=("2303.10845", "2106.04426"),
        score="none",
        selection="a random table by domain and token id, `expert_of_token`",
        weight="1 / K, on the output",
        balance="none: nothing can be learned",
        state="`expert_of_token`, no weight",
        use_when="routing that must not drift, or experts by domain that are cut out again with `extract_domain`",
    )
    score = "identity"
    options = ("num_hash_domains",)
    requires = ("input_ids_T", "domain_T")
    has_rows = False
    holds_besides_rows = "a table of the experts of every token id"
    has_balance_loss = False
    expert_of_token: torch.Tensor

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.num_domains = config.num_hash_domains
        shape = (self.num_domains, config.vocab_size, self.top_k)
        self.register_buffer("expert_of_token", torch.zeros(shape, dtype=torch.int32))

    @property
    def sizes_of_parts(self) -> list[int]:
        return [self.num_experts // self.num_domains] * self.num_domains

    def build_weight(self, config) -> nn.Parameter | None:
        return None

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        table = draw_expert_table(*self.expert_of_token.shape, self.num_experts)
        init.copy_(self.expert_of_token, table.to(self.expert_of_token.device))

    def resize_vocabulary(self, vocab_size: int) -> None:
        """New token ids get experts as the others did: at random, every expert as often as others."""
        num_domains, num_known, top_k = self.expert_of_token.shape
        table = draw_expert_table(num_domains, max(vocab_size - num_known, 0), top_k, self.num_experts)
        table = torch.cat([self.expert_of_token, table.to(self.expert_of_token.device)], dim=1)
        self.expert_of_token = table[:, :vocab_size].contiguous()

    @staticmethod
    def validate(config) -> None:
        if getattr(config, "vocab_size", None) is None:
            raise ValueError("router_type='hash' routes by token id, and this model has no vocabulary.")
        for count in config.counts_of_experts:
            if count % config.num_hash_domains:
                raise ValueError(
                    f"The number of experts of every layer ({count}) must be a multiple of `num_hash_domains` ({config.num_hash_domains}), of "
                    "which each has experts of its own."
                )
            if config.num_experts_per_tok > count // config.num_hash_domains:
                raise ValueError(
                    f"A domain has {count // config.num_hash_domains} experts (of {count}, with `num_hash_domains`={config.num_hash_domains}), "
                    f"fewer than `num_experts_per_tok` ({config.num_experts_per_tok})."
                )

    @staticmethod
    def weight_sum(config, num_experts: int) -> float | None:
        return 1.0

    @staticmethod
    def count_domains(config) -> int:
        return config.num_hash_domains

    def compute_logits(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        """The probability of every expert, 1 / K or 0."""
        index_TK = self._look_up(hidden_states_TH, tokens)
        logits_TE = torch.zeros(len(index_TK), self.num_experts, device=hidden_states_TH.device)
        return logits_TE.scatter(-1, index_TK, 1 / self.top_k)

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.topk(logits_TE, self.top_k, dim=-1)

    def _look_up(self, hidden_states_TH: torch.Tensor, tokens: Tokens | None) -> torch.Tensor:
        if tokens is None or tokens.input_ids_T is None:
            raise ValueError(
                "router_type='hash' routes by token id: call the model with `input_ids`, not `inputs_embeds`."
            )
        if tokens.input_ids_T.shape != hidden_states_TH.shape[:1]:
            raise ValueError(
                f"router_type='hash' got {len(tokens.input_ids_T)} token ids for {len(hidden_states_TH)} tokens. Call the model with `input_ids` alone."
            )
        if tokens.domain_T is None:
            if self.num_domains > 1:
                raise ValueError(
                    f"This model has experts for {self.num_domains} domains: call it with `domain_ids`, the domain of each sequence."
                )
            return self.expert_of_token[0, tokens.input_ids_T].long()
        return self.expert_of_token[tokens.domain_T, tokens.input_ids_T].long()


def draw_expert_table(
    num_domains: int, vocab_size: int, top_k: int, num_experts: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    A random table `(D, V, K)` in int32: for each domain and token id K different experts, every one of a domain's experts as
    often as the others, or once more.
    """
    size = num_experts // num_domains
    tables = []
    for domain in range(num_domains):
        order_V = torch.randperm(vocab_size, generator=generator, device="cpu")
        # The k-th expert of a token is as far from its first one as for all others, so that the K are different.
        steps_K = torch.randperm(size, generator=generator, device="cpu")[:top_k]
        tables.append((order_V[:, None] + steps_K) % size + domain * size)
    return torch.stack(tables).to(torch.int32)


class ExpertChoiceRouter(MoeRouter):
    """
    Every expert takes the tokens that it scores highest, as many as all others; a token gets any number of experts.

    In a causal model a token's experts would depend on what comes after it, so that training sees the future and generation
    cannot.
    """

    contract = RouterContract(
        system="Expert Choice",
        papers=("2202.09368",),
        score="softmax(W x)",
        selection="every expert takes the K / E of the tokens of a group (`capacity_group`) that it scores highest",
        weight="the score, on the output",
        balance="none: all experts have the same load",
        use_when="encoders; a causal model needs `allow_causal_expert_choice`",
    )
    score = "softmax"
    options = ("capacity_group", "allow_causal_expert_choice")
    requires = ("mask_T",)
    decides_alone = False
    has_variable_top_k = True
    unreplayable_because = "its experts select tokens"
    has_balance_loss = False

    def __init__(self, config, num_experts: int):
        super().__init__(config, num_experts)
        self.capacity_group = config.capacity_group

    @property
    def is_even_in_sequences(self) -> bool:
        return self.capacity_group == "sequence"

    @staticmethod
    def validate(config) -> None:
        if config.is_causal_model and not config.allow_causal_expert_choice:
            raise ValueError(
                "router_type='expert_choice' lets later tokens decide which experts a token gets, so a causal model would be trained on "
                "what it cannot see when it generates. Use an encoder or another router, or set `allow_causal_expert_choice=True`."
            )

    @staticmethod
    def shares_weight_among_copies(config) -> bool:
        return True

    def choose(self, logits_TE: torch.Tensor, tokens: Tokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores_TE = float32_softmax(logits_TE)
        tokens = tokens or Tokens(batch_size=1)
        num_groups = tokens.num_groups(self.capacity_group, len(scores_TE))
        for_choice_TE = scores_TE.detach()
        mask_T = scores_TE.new_ones(len(scores_TE)) if tokens.mask_T is None else tokens.mask_T.to(scores_TE.dtype)
        for_choice_TE = for_choice_TE.masked_fill(mask_T[:, None] == 0, -1.0)
        for_choice_BSE = for_choice_TE.unflatten(0, (num_groups, -1))
        length = for_choice_BSE.shape[1]
        most = min(length, math.ceil(length * self.top_k / self.num_experts))
        taken_B = (mask_T.view(num_groups, -1).sum(-1) * self.top_k / self.num_experts).ceil()
        best_BCE = for_choice_BSE.topk(most, dim=1).indices
        is_taken_BCE = (torch.arange(most, device=logits_TE.device) < taken_B[:, None])[..., None].expand(
            best_BCE.shape
        )
        is_chosen_BSE = torch.zeros_like(for_choice_BSE, dtype=torch.bool).scatter_(1, best_BCE, is_taken_BCE)
        is_chosen_TE = is_chosen_BSE.flatten(0, 1)
        index_TE = torch.arange(self.num_experts, device=logits_TE.device).expand(scores_TE.shape)
        return scores_TE.masked_fill(~is_chosen_TE, 0.0), index_TE.masked_fill(~is_chosen_TE, self.num_experts)
