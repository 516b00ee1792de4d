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
"""Balance losses: pure functions of the routing of one layer, each with its value under perfect balance.

All compute in float32 and leave out what `mask_T` calls padding; none asks the device for a number.

Dimension letters: T tokens, E experts, K experts per token, B sequences, S tokens of a sequence, D devices.
"""

import math

import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def count_choices(top_k_index_TK: torch.Tensor, num_experts: int, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """
    How many slots each expert serves.

    Args:
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): Chosen experts; `num_experts` stands for none.
        num_experts (`int`): Number of experts.
        mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor` of shape `(E,)` in float32.
    """
    mask_T = top_k_index_TK.new_ones(len(top_k_index_TK)) if mask_T is None else mask_T
    counted_TK = mask_T.to(torch.float32)[:, None].expand(top_k_index_TK.shape)
    counts = torch.zeros(num_experts + 1, dtype=torch.float32, device=top_k_index_TK.device)
    return counts.scatter_add_(0, top_k_index_TK.reshape(-1), counted_TK.reshape(-1))[:num_experts]


def switch_loss(scores_TE: torch.Tensor, counts_E: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """
    Switch's balance loss `E * sum_i f_i P_i` (https://huggingface.co/papers/2101.03961), f the share of the slots and P the
    mean score; 1 if balanced. With counts of more than the tokens at hand it is the global-batch loss
    (https://huggingface.co/papers/2501.11873).

    Args:
        scores_TE (`torch.Tensor` of shape `(T, E)`): Scores of a token, which sum to 1.
        counts_E (`torch.Tensor` of shape `(E,)`): Slots that each expert served, by which the gradient is weighted.
        mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for tokens, 0 for padding.
    """
    return len(counts_E) * (_shares(counts_E) * masked_mean(scores_TE, mask_T)).sum()


def device_loss(
    scores_TE: torch.Tensor, counts_E: torch.Tensor, num_devices: int, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """DeepSeekMoE's balance between devices that hold consecutive experts (https://huggingface.co/papers/2401.06066); 1 if
    balanced."""
    return switch_loss(
        scores_TE.unflatten(-1, (num_devices, -1)).sum(-1), counts_E.view(num_devices, -1).sum(-1), mask_T
    )


def heterogeneous_loss(
    scores_TE: torch.Tensor,
    counts_E: torch.Tensor,
    num_feed_forwards: int,
    zero_expert_tau: float,
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    MoE++'s balance loss (https://huggingface.co/papers/2410.07348): Switch's, in which an expert that computes nothing
    counts `zero_expert_tau` times; the smaller that is, the more tokens it may get. With one share for all feed-forwards
    and one for all others it is `zero_expert_tau * E / (zero_expert_tau * N + E - N)` if those are as `zero_expert_tau` to
    1, N being `num_feed_forwards`.

    Args:
        scores_TE (`torch.Tensor` of shape `(T, E)`): Scores of a token, which sum to 1.
        counts_E (`torch.Tensor` of shape `(E,)`): Slots that each expert served; the feed-forwards are the first.
        num_feed_forwards (`int`): How many of the experts are feed-forwards.
        zero_expert_tau (`float`): The factor of the others.
        mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for tokens, 0 for padding.
    """
    terms_E = _shares(counts_E) * masked_mean(scores_TE, mask_T)
    feed_forwards, others = terms_E[:num_feed_forwards].sum(), terms_E[num_feed_forwards:].sum()
    return len(counts_E) * (feed_forwards + zero_expert_tau * others)


def squared_deviation_loss(scores_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Skywork-MoE's balance loss, `sum_i (1 / E - P_i) ** 2` with P the mean score (https://huggingface.co/papers/2406.06563);
    0 if balanced."""
    return (masked_mean(scores_TE, mask_T) - 1 / scores_TE.shape[-1]).square().sum()


def group_divergence_loss(scores_TG: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """The Kullback-Leibler divergence of the groups' mean scores from an even load, divided by the number of groups
    (https://huggingface.co/papers/2510.02345); 0 if balanced."""
    num_groups = scores_TG.shape[-1]
    mean_G = masked_mean(scores_TG, mask_T).clamp(min=1e-20)
    return -(mean_G * num_groups).log().mean() / num_groups


def competitive_loss(outputs_TEH: torch.Tensor, targets_TH: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
    """
    The loss with which the mixtures of 1991 made experts compete, `-log sum_i p_i exp(-|d - o_i|^2 / 2)`, averaged over the
    tokens: an expert learns from a token as much as it explains it.

    Args:
        outputs_TEH (`torch.Tensor` of shape `(T, E, H)`): What every expert gives.
        targets_TH (`torch.Tensor` of shape `(T, H)`): What they should give.
        scores_TE (`torch.Tensor` of shape `(T, E)`): Scores of a token, which sum to 1.
    """
    squared_TE = (outputs_TEH - targets_TH[:, None]).square().sum(-1)
    return -torch.logsumexp(scores_TE.clamp(min=1e-20).log() - 0.5 * squared_TE, dim=-1).mean()


def sequence_loss(
    scores_TE: torch.Tensor, top_k_index_TK: torch.Tensor, batch_size: int, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """
    DeepSeek-V3's balance within each sequence (https://huggingface.co/papers/2412.19437), averaged over the sequences; 1 if
    balanced.

    Args:
        scores_TE (`torch.Tensor` of shape `(T, E)`): Scores of a token, which sum to 1.
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): Chosen experts; `E` stands for none.
        batch_size (`int`): Number of sequences, of `T / batch_size` tokens each.
        mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for tokens, 0 for padding.
    """
    num_experts = scores_TE.shape[-1]
    mask_T = scores_TE.new_ones(len(scores_TE)) if mask_T is None else mask_T.to(scores_TE.dtype)
    mask_BS = mask_T.view(batch_size, -1)
    counted_TK = mask_T[:, None].expand(top_k_index_TK.shape)
    counts_BE = scores_TE.new_zeros(batch_size, num_experts + 1)
    counts_BE.scatter_add_(1, top_k_index_TK.reshape(batch_size, -1), counted_TK.reshape(batch_size, -1))
    shares_BE = counts_BE[:, :-1] / counts_BE[:, :-1].sum(-1, keepdim=True).clamp(min=1)
    tokens_B = mask_BS.sum(-1)
    sums_BE = (scores_TE * mask_T[:, None]).view(batch_size, -1, num_experts).sum(1)
    losses_B = num_experts * (shares_BE * sums_BE / tokens_B.clamp(min=1)[:, None]).sum(-1)
    return losses_B.sum() / (tokens_B > 0).sum().clamp(min=1)


def importance_loss(weights_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """The squared coefficient of variation of the routing weights that experts got (https://huggingface.co/papers/1701.06538);
    0 if balanced."""
    return squared_variation(masked_mean(weights_TE, mask_T))


def load_loss(
    logits_TE: torch.Tensor,
    top_k: int,
    noise_std: float | torch.Tensor,
    mask_T: torch.Tensor | None = None,
    noisy_logits_TE: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The squared coefficient of variation of a smooth estimate of the load (https://huggingface.co/papers/1701.06538): the
    probability that an expert is among the K largest when noise is drawn anew for it alone; 0 if balanced.

    Args:
        logits_TE (`torch.Tensor` of shape `(T, E)`): Logits without noise.
        top_k (`int`): Number of experts per token, less than E.
        noise_std (`float` or `torch.Tensor` of shape `(T, E)`): Standard deviation of the noise.
        mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for tokens, 0 for padding.
        noisy_logits_TE (`torch.Tensor` of shape `(T, E)`, *optional*): Logits with the noise that was drawn.
    """
    return squared_variation(masked_mean(load_probabilities(logits_TE, top_k, noise_std, noisy_logits_TE), mask_T))


def load_probabilities(
    logits_TE: torch.Tensor,
    top_k: int,
    noise_std: float | torch.Tensor,
    noisy_logits_TE: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(T, E)`: the probability of [`load_loss`] that an expert is chosen."""
    noisy_logits_TE = logits_TE if noisy_logits_TE is None else noisy_logits_TE
    largest = noisy_logits_TE.topk(top_k + 1, dim=-1).values
    # The K-th largest of the others: of a chosen expert the next one, of the others the last that was chosen.
    is_chosen_TE = noisy_logits_TE > largest[..., -1:]
    threshold_TE = torch.where(is_chosen_TE, largest[..., -1:], largest[..., -2:-1])
    return 0.5 * (1 + torch.erf((logits_TE - threshold_TE) / (noise_std * math.sqrt(2))))


def z_loss(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """ST-MoE's router z-loss, the mean of `logsumexp(logits) ** 2` (https://huggingface.co/papers/2202.08906)."""
    return masked_mean(logits_TE.logsumexp(-1, keepdim=True).square(), mask_T)[0]


def entropy_loss(scores_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """The mean entropy of a token's scores in nats, which keeps the number of experts small in dynamic routing
    (https://huggingface.co/papers/2403.07652); 0 if every token is sure."""
    # The derivative of p log p at 0 is infinite, and no expert there can be made likelier by it.
    terms_TE = scores_TE * scores_TE.clamp(min=torch.finfo(scores_TE.dtype).tiny).log()
    return -masked_mean(terms_TE.sum(-1, keepdim=True), mask_T)[0]


def sparsity_loss(
    weights_TE: torch.Tensor, counts_E: torch.Tensor, top_k: int, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """ReMoE's L1 loss of routing weights, weighted by the load (https://huggingface.co/papers/2412.14711):
    `E * sum_i f_i * mean_t w_i` with `f_i` the slots of the expert by `T * K`."""
    num_tokens = len(weights_TE) if mask_T is None else mask_T.sum().clamp(min=1)
    shares_E = counts_E / (num_tokens * top_k)
    return len(counts_E) * (shares_E * masked_mean(weights_TE, mask_T)).sum()


def masked_mean(values_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the tokens that are no padding, `(E,)`."""
    if mask_T is None:
        return values_TE.mean(0)
    mask_T = mask_T.to(values_TE.dtype)
    return (values_TE * mask_T[:, None]).sum(0) / mask_T.sum().clamp(min=1)


def scores_of(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """
    What a router makes of its logits before it chooses, in float32 and divided by the sum of a token.

    Args:
        score (`str`): One of `SCORES`.
    """
    scores_TE = SCORES[score](logits_TE.float())
    return scores_TE if score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)


SCORES = {
    "softmax": lambda logits_TE: F.softmax(logits_TE, dim=-1),
    "sigmoid": F.sigmoid,
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "relu": F.relu,
    "identity": lambda probabilities_TE: probabilities_TE,  # a router that returns probabilities for logits
}


def _shares(counts_E: torch.Tensor) -> torch.Tensor:
    return counts_E / counts_E.sum().clamp(min=1)


def squared_variation(values_E: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation, with the population's variance."""
    return values_E.var(correction=0) / (values_E.mean().square() + 1e-10)


def mixtral_balance_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    The balance loss of transformers' Mixtral over all layers; its mean over them where they differ in their number of experts.

    Args:
        router_logits (`tuple[torch.Tensor, ...]`): Of every layer, `(T, E)`.
        top_k (`int`): Number of experts per token.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor` without dimensions, `top_k` if balanced.
    """
    by_num_experts: dict[int, list[torch.Tensor]] = {}
    for logits in router_logits:
        by_num_experts.setdefault(logits.shape[-1], []).append(logits)
    losses = [
        len(group) * load_balancing_loss_func(tuple(group), num_experts, top_k, attention_mask)
        for num_experts, group in by_num_experts.items()
    ]
    return sum(losses) / len(router_logits)
