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
"""Capacity: how many tokens of a group an expert takes, and which ones if more want it.

`ExpertCapacity` stands between the router and the experts of a block whose configuration has a `capacity_policy`. It asks
the device for nothing: how many tokens are no padding, and so how many an expert takes, stays there.

Dimension letters: T tokens, E experts, K experts per token, B groups of tokens, N slots (T * K).
"""

from fractions import Fraction

import torch
from torch import nn

from .losses import scores_of
from .routing_context import Tokens


CAPACITY_POLICIES = {
    "none": "no token is dropped",
    "position": "the first tokens are kept",
    "probability": "the tokens with the largest routing weights are kept",
    "random": "tokens are kept by chance in training, the first ones in evaluation",
    "batch_prioritized": "all first choices before the second ones, tokens with the largest score first",
    "recycle": "as `position`, and the others go to experts with room: random ones in training, spread evenly in evaluation",
}
RECYCLING_ROUNDS = 3
PARTS_OF_A_STEP = 1024


class ExpertCapacity(nn.Module):
    """
    Takes slots away from experts that more tokens chose than they have room for.

    Of every group of tokens (`capacity_group`) with n tokens without padding, an expert has room for
    `ceil(capacity_factor * K * n / E)`, at least `min_capacity`; in evaluation for `eval_capacity_factor`, and without one for
    all. With zero-computation experts the room is dealt out as in MoE++: a feed-forward has `zero_expert_tau` times that of
    another. A dropped slot has index `num_experts` and weight 0, so that the token passes on through the residual stream.
    Padding never takes room.

    Args:
        config: The configuration.
        num_experts (`int`): Number of experts, those without computation included.
        score (`str`): What the router makes of its logits.
        queues_by_choice (`bool`): Whether the first choices of all tokens come before the second ones.
    """

    def __init__(self, config, num_experts: int, score: str, queues_by_choice: bool):
        super().__init__()
        self.policy, self.group = config.effective_capacity_policy, config.capacity_group
        self.factor, self.eval_factor = config.capacity_factor, config.eval_capacity_factor
        self.min_capacity = config.min_capacity
        self.num_experts, self.top_k, self.score = num_experts, config.num_experts_per_tok, score
        self.num_zero_computation_experts = config.num_zero_computation_experts
        self.zero_expert_tau = config.zero_expert_tau
        self.queues_by_choice = queues_by_choice
        self.shares_of_factor: dict[float, tuple[Fraction, Fraction]] = {}

    @property
    def current_factor(self) -> float | None:
        """The capacity factor of this mode; None if nothing is dropped in it."""
        return self.factor if self.training else self.eval_factor

    def forward(
        self,
        router_logits_TE: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        tokens: Tokens,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, K)` weights and `(T, K)` experts with the dropped slots."""
        if tokens.mask_T is not None:
            is_padding_T1 = ~tokens.mask_T[:, None]
            top_k_index_TK = top_k_index_TK.masked_fill(is_padding_T1, self.num_experts)
            top_k_weights_TK = top_k_weights_TK.masked_fill(is_padding_T1, 0.0)
        factor = self.current_factor
        if factor is None:
            return top_k_weights_TK, top_k_index_TK
        num_groups = tokens.num_groups(self.group, len(top_k_index_TK))
        room_BE = self.room(tokens, num_groups, len(top_k_index_TK), factor, top_k_weights_TK.device)
        place_TK = self.place_in_queue(router_logits_TE, top_k_weights_TK, top_k_index_TK, num_groups)
        # A slot without an expert stays what it is, whatever its place is compared with.
        expert_BN = top_k_index_TK.reshape(num_groups, -1).clamp(max=self.num_experts - 1)
        is_over_TK = place_TK >= room_BE.gather(1, expert_BN).view_as(place_TK)
        weights_TK = top_k_weights_TK.masked_fill(is_over_TK, 0.0)
        index_TK = top_k_index_TK.masked_fill(is_over_TK, self.num_experts)
        if self.policy != "recycle":
            return weights_TK, index_TK
        is_overflow_TK = is_over_TK & (top_k_index_TK < self.num_experts)
        new_index_TK = recycle(index_TK, is_overflow_TK, room_BE, num_groups, is_random=self.training)
        scores_TE = nn.functional.pad(scores_of(router_logits_TE, self.score), (0, 1))
        scale_TK = scores_TE.gather(-1, new_index_TK) / scores_TE.gather(-1, top_k_index_TK).clamp(min=1e-20)
        return torch.where(is_overflow_TK, top_k_weights_TK * scale_TK, weights_TK), new_index_TK

    def room(
        self, tokens: Tokens, num_groups: int, num_tokens: int, factor: float, device: torch.device
    ) -> torch.Tensor:
        """`(B, E)` in int64: how many tokens of a group an expert takes."""
        num_zero = self.num_zero_computation_experts
        num_feed_forwards = self.num_experts - num_zero
        if factor not in self.shares_of_factor:
            slots = factor * self.top_k
            self.shares_of_factor[factor] = shares(slots, self.zero_expert_tau, num_feed_forwards, num_zero)
        share, of_zero = self.shares_of_factor[factor]
        size = num_tokens // num_groups
        if tokens.mask_T is not None:
            size = tokens.mask_T.view(num_groups, -1).sum(-1, keepdim=True)
        rooms = []
        for part, num_experts in [(share, num_feed_forwards), (of_zero, num_zero)][: 2 if num_zero else 1]:
            room = -(-size * part.numerator // part.denominator)
            if tokens.mask_T is None:
                room = torch.full((num_groups, 1), room, device=device)
            rooms.append(room.expand(-1, num_experts))
        return torch.cat(rooms, dim=-1).clamp(min=self.min_capacity)

    def place_in_queue(
        self,
        router_logits_TE: torch.Tensor,
        top_k_weights_TK: torch.Tensor,
        top_k_index_TK: torch.Tensor,
        num_groups: int,
    ) -> torch.Tensor:
        """`(T, K)`: how many slots of the group stand before this one in the queue of its expert."""
        top_k = top_k_index_TK.shape[-1]
        index_BN = top_k_index_TK.reshape(num_groups, -1)
        number_N = torch.arange(index_BN.shape[-1], device=index_BN.device)
        priority_TK = self.priority(router_logits_TE, top_k_weights_TK)
        is_by_choice = self.queues_by_choice and self.policy != "probability" or self.policy == "batch_prioritized"
        # Stable sorts by keys of rising importance: priority, choice, then expert.
        if priority_TK is not None:
            order_BN = priority_TK.reshape(index_BN.shape).argsort(dim=-1, stable=True, descending=True)
            if is_by_choice:
                order_BN = order_BN.gather(-1, (order_BN % top_k).argsort(dim=-1, stable=True))
        else:
            order_N = number_N.view(-1, top_k).T.flatten() if is_by_choice else number_N
            order_BN = order_N.expand(index_BN.shape)
        queue_BN, in_order_BN = index_BN.gather(-1, order_BN).sort(dim=-1, stable=True)
        place_BN = number_N - torch.searchsorted(queue_BN, queue_BN)
        place_BN = torch.empty_like(place_BN).scatter_(-1, order_BN.gather(-1, in_order_BN), place_BN)
        return place_BN.view_as(top_k_index_TK)

    def priority(self, router_logits_TE: torch.Tensor, top_k_weights_TK: torch.Tensor) -> torch.Tensor | None:
        """`(T, K)`: what moves a slot to the front of its queue; None if slots stand there as in the batch."""
        if self.policy == "probability":
            return top_k_weights_TK.detach()
        if self.policy == "batch_prioritized":
            scores_T1 = scores_of(router_logits_TE.detach(), self.score).amax(-1, keepdim=True)
            return scores_T1.expand(top_k_weights_TK.shape)
        if self.policy == "random" and self.training:
            return torch.rand(top_k_weights_TK.shape, device=top_k_weights_TK.device)
        return None


def shares(slots: float, tau: float, num_feed_forwards: int, num_zero: int) -> tuple[Fraction, Fraction]:
    """
    How much of the slots per token a feed-forward has room for, and a zero-computation expert, if there are so many of each.

    Fractions, because a product of floats, 1.1 * 10 / 11, can be a little above the whole number that it is.
    """
    exact, exact_tau = (Fraction(str(number)).limit_denominator(10**6) for number in (slots, tau))
    of_zero = exact / (exact_tau * num_feed_forwards + num_zero)
    return exact_tau * of_zero, of_zero


def recycle(
    index_TK: torch.Tensor,
    is_overflow_TK: torch.Tensor,
    room_BE: torch.Tensor,
    num_groups: int,
    is_random: bool = True,
) -> torch.Tensor:
    """
    Hunyuan-Large's recycling (https://huggingface.co/papers/2411.02265): slots that found no room go to experts of their group
    that have some, each free place with about the same probability; without room they stay dropped.

    No token gets an expert twice: a slot to which such a place falls looks again, `RECYCLING_ROUNDS` times in all.

    Args:
        index_TK (`torch.Tensor` of shape `(T, K)`): The experts of the slots that found room, E elsewhere.
        is_overflow_TK (`torch.Tensor` of shape `(T, K)`): Which slots look for another expert.
        room_BE (`torch.Tensor` of shape `(B, E)`): How many slots an expert takes in a group.
        num_groups (`int`): Number of groups B.
        is_random (`bool`): Whether the slots get random places, or, in their order, places at even distances.

    Returns:
        `torch.Tensor` of shape `(T, K)`: The experts.
    """
    top_k, num_experts = index_TK.shape[-1], room_BE.shape[-1]
    for turn in range(min(top_k, RECYCLING_ROUNDS)):
        is_looking_TK = is_overflow_TK & (index_TK == num_experts)
        index_BN, is_looking_BN = index_TK.view(num_groups, -1), is_looking_TK.view(num_groups, -1)
        rank_BN = _random_rank(is_looking_BN) if is_random else _rank(is_looking_BN, turn)
        new_TK = _places_for(index_BN, is_looking_BN, rank_BN, room_BE, is_random).view_as(index_TK)
        is_same_TKK = (new_TK[:, :, None] == new_TK[:, None, :]).tril(diagonal=-1)
        is_same_TKK |= new_TK[:, :, None] == index_TK[:, None, :]
        index_TK = torch.where(is_looking_TK & ~is_same_TKK.any(-1), new_TK, index_TK)
    return index_TK


def _random_rank(is_looking_BN: torch.Tensor) -> torch.Tensor:
    """`(B, N)`: a random order of the slots that look for an expert, before all others."""
    random_BN = torch.rand(is_looking_BN.shape, device=is_looking_BN.device).masked_fill(~is_looking_BN, 2.0)
    return random_BN.argsort(dim=-1).argsort(dim=-1)


def _rank(is_looking_BN: torch.Tensor, turn: int) -> torch.Tensor:
    """`(B, N)`: their own order, which begins with another one at every turn."""
    number_B1 = is_looking_BN.sum(-1, keepdim=True).clamp(min=1)
    return (is_looking_BN.cumsum(-1) - 1 + turn * number_B1 // RECYCLING_ROUNDS) % number_B1


def _places_for(
    index_BN: torch.Tensor,
    is_looking_BN: torch.Tensor,
    rank_BN: torch.Tensor,
    room_BE: torch.Tensor,
    is_random: bool,
) -> torch.Tensor:
    """`(B, N)`: in the order of their rank, experts with room for the slots that look for one; others keep what they have."""
    num_groups, num_experts = room_BE.shape
    taken_BE = torch.zeros(num_groups, num_experts + 1, dtype=torch.long, device=index_BN.device)
    taken_BE = taken_BE.scatter_add_(1, index_BN, torch.ones_like(index_BN))[:, :-1]
    free_until_BE = (room_BE - taken_BE).clamp(min=0).cumsum(-1)
    num_free_B1 = free_until_BE[:, -1:]
    # Even steps through the free places if there are more than slots, from a random part of a step on or from its middle.
    num_looking_B1 = is_looking_BN.sum(-1, keepdim=True).clamp(min=1)
    if is_random:
        part_B1 = torch.randint(PARTS_OF_A_STEP, (num_groups, 1), device=index_BN.device)
    else:
        part_B1 = torch.full_like(num_looking_B1, PARTS_OF_A_STEP // 2)
    spread_BN = (rank_BN * PARTS_OF_A_STEP + part_B1) * num_free_B1 // (num_looking_B1 * PARTS_OF_A_STEP)
    place_BN = torch.where(num_free_B1 > num_looking_B1, spread_BN, rank_BN)
    new_BN = torch.searchsorted(free_until_BE, place_BN, right=True)
    return torch.where(is_looking_BN & (place_BN < num_free_B1), new_BN, index_BN)
