# SPDX-License-Identifier: Apache-2.0
"""Balance losses beside golden tensors of other implementations, transformers' own, and values under perfect balance."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.models import losses


GOLDEN = Path(__file__).parents[1] / "golden"


def random_routing(top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `(24, 6)`, choices and a mask that leaves out some tokens."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.randn(24, 6, generator=generator).softmax(-1)
    mask_T = (torch.rand(24, generator=generator) > 0.3).long()
    return scores_TE, scores_TE.topk(top_k).indices, mask_T


@pytest.mark.parametrize(("name", "top_k"), [("switch_top1_det", 1), ("gshard_top2_det", 1), ("megatron_utils", 4)])
def test_switch_loss_beside_other_implementations(name, top_k):
    """GShard's counts first choices only."""
    golden = load_file(GOLDEN / f"{name}.safetensors")
    scores_TE = golden["logits"].softmax(-1)
    counts_E = losses.count_choices(scores_TE.topk(top_k).indices, scores_TE.shape[-1])
    expected = golden["aux_switch" if name == "megatron_utils" else "l_aux"]
    assert_close(losses.switch_loss(scores_TE, counts_E), expected.squeeze(), 1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_switch_loss_beside_transformers(top_k):
    scores_TE, index_TK, mask_T = random_routing(top_k)
    counts_E = losses.count_choices(index_TK, 6, mask_T)
    expected = load_balancing_loss_func((scores_TE.log(),), 6, top_k, mask_T.view(2, 12)) / top_k
    assert_close(losses.switch_loss(scores_TE, counts_E, mask_T), expected, 1e-6)


def test_device_loss():
    scores_TE, index_TK, mask_T = random_routing()
    counts_E = losses.count_choices(index_TK, 6, mask_T)
    shares, means = counts_E / counts_E.sum(), scores_TE[mask_T.bool()].mean(0)
    expected = 3 * sum(shares[d : d + 2].sum() * means[d : d + 2].sum() for d in (0, 2, 4))
    assert_close(losses.device_loss(scores_TE, counts_E, 3, mask_T), expected, 1e-6)
    assert_close(
        losses.device_loss(scores_TE, counts_E, 6, mask_T), losses.switch_loss(scores_TE, counts_E, mask_T), 1e-6
    )


def test_sequence_loss_is_the_mean_of_sequences():
    scores_TE, index_TK, mask_T = random_routing()
    alone = []
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        counts_E = losses.count_choices(index_TK[rows], 6, mask_T[rows])
        alone.append(losses.switch_loss(scores_TE[rows], counts_E, mask_T[rows]))
    assert_close(losses.sequence_loss(scores_TE, index_TK, 3, mask_T), sum(alone) / 3, 1e-6)
    mask_T[8:16] = 0  # a sequence that is padding alone
    expected = (alone[0] + alone[2]) / 2
    assert_close(losses.sequence_loss(scores_TE, index_TK, 3, mask_T), expected, 1e-6)


def test_importance_and_load_beside_the_noisy_gate():
    path = GOLDEN / "shazeer_noisy.safetensors"
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        top_k, eps = int(file.metadata()["k"]), float(file.metadata()["eps"])
    logits_TE = golden["x"] @ golden["w_gate"]
    std_TE = F.softplus(golden["x"] @ golden["w_noise"]) + eps
    noisy_TE = logits_TE + golden["noise"] * std_TE
    load_E = losses.load_probabilities(logits_TE, top_k, std_TE, noisy_TE).sum(0)
    assert_close(load_E, golden["load"], 1e-6)
    weights_TE = torch.zeros_like(logits_TE).scatter(1, golden["top_idx"], golden["top_w"])
    loss = losses.importance_loss(weights_TE) + losses.load_loss(logits_TE, top_k, std_TE, noisy_logits_TE=noisy_TE)
    num_experts = logits_TE.shape[-1]
    assert_close(loss, golden["loss_unbiased_var"][0] * (num_experts - 1) / num_experts, 1e-5)


@pytest.mark.parametrize(("top_k", "size"), [(1, 2), (2, 5)])
def test_load_in_groups_is_that_of_each_group(top_k, size):
    torch.manual_seed(0)
    logits_TGM = torch.randn(10, 3, size)
    std_TGM = torch.rand(10, 3, size) + 0.1
    noisy_TGM = logits_TGM + std_TGM * torch.randn(10, 3, size)
    together = losses.load_probabilities(logits_TGM, top_k, std_TGM, noisy_TGM)
    for group in range(3):
        alone = losses.load_probabilities(logits_TGM[:, group], top_k, std_TGM[:, group], noisy_TGM[:, group])
        assert_close(together[:, group], alone, 1e-6)


def test_sparsity_loss_beside_remoe():
    golden = load_file(GOLDEN / "remoe.safetensors")
    weights_TE = golden["logits"].relu()
    counts_E = (weights_TE > 0).sum(0).float()
    assert_close(losses.sparsity_loss(weights_TE, counts_E, 2), golden["l1_reg"][0], 1e-6)


def test_balance_is_the_minimum():
    """Every expert once, with the score that the docstrings name."""
    scores_TE, index_TK = torch.full((6, 6), 1 / 6), torch.arange(6)[:, None]
    counts_E = losses.count_choices(index_TK, 6)
    assert losses.switch_loss(scores_TE, counts_E) == pytest.approx(1)
    assert losses.device_loss(scores_TE, counts_E, 2) == pytest.approx(1)
    assert losses.sequence_loss(scores_TE, index_TK, 1) == pytest.approx(1)
    assert losses.importance_loss(scores_TE) == pytest.approx(0)
    assert losses.load_loss(torch.zeros(6, 6), 1, 0.5) == pytest.approx(0)
    assert losses.entropy_loss(torch.eye(6)) == pytest.approx(0)


def test_z_and_entropy_loss():
    scores_TE, _, mask_T = random_routing()
    kept = scores_TE[mask_T.bool()]
    assert_close(losses.entropy_loss(scores_TE, mask_T), -(kept * kept.log()).sum(-1).mean(), 1e-6)
    logits_TE = scores_TE.log() + 3  # whose logsumexp is 3
    assert losses.z_loss(logits_TE, mask_T) == pytest.approx(9, abs=1e-5)


def test_counts_leave_out_padding_and_empty_slots():
    index_TK = torch.tensor([[0, 1], [1, 3], [2, 3], [1, 2]])
    assert losses.count_choices(index_TK, 3).tolist() == [1, 3, 2]
    assert losses.count_choices(index_TK, 3, torch.tensor([1, 1, 0, 1])).tolist() == [1, 3, 1]


def test_everything_padding():
    scores_TE, index_TK, _ = random_routing()
    mask_T = torch.zeros(24)
    counts_E = losses.count_choices(index_TK, 6, mask_T)
    values = [
        losses.switch_loss(scores_TE, counts_E, mask_T),
        losses.sequence_loss(scores_TE, index_TK, 2, mask_T),
        losses.z_loss(scores_TE, mask_T),
    ]
    assert [float(value) for value in values] == [0, 0, 0]


@pytest.mark.parametrize("score", losses.SCORES)
def test_scores_sum_to_one(score):
    logits_TE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).abs()
    scores_TE = losses.scores_of(logits_TE.bfloat16(), score)
    assert scores_TE.dtype == torch.float32
    assert_close(scores_TE.sum(-1), torch.ones(5))


def test_competitive_loss_in_closed_form():
    """Jacobs et al. 1991, one token and expert after the other; experts that explain a token better learn more from it."""
    generator = torch.Generator().manual_seed(0)
    outputs_TEH = torch.randn(5, 3, 4, generator=generator).requires_grad_()
    targets_TH = torch.randn(5, 4, generator=generator)
    scores_TE = torch.randn(5, 3, generator=generator).softmax(-1)
    expected = 0.0
    for token in range(5):
        distances = (outputs_TEH[token] - targets_TH[token]).square().sum(-1)
        expected = expected - (scores_TE[token] * (-0.5 * distances).exp()).sum().log() / 5
    loss = losses.competitive_loss(outputs_TEH, targets_TH, scores_TE)
    assert_close(loss, expected, 1e-6)
    (gradient_TEH,) = torch.autograd.grad(loss, outputs_TEH)
    distances_TE = (outputs_TEH - targets_TH[:, None]).square().sum(-1)
    posterior_TE = (scores_TE.log() - 0.5 * distances_TE).softmax(-1)
    assert_close(gradient_TEH, posterior_TE[..., None] * (outputs_TEH - targets_TH[:, None]) / 5, 1e-5)
    assert losses.competitive_loss(targets_TH[:, None], targets_TH, torch.ones(5, 1)) == pytest.approx(0)


def test_skyworks_loss():
    scores_TE, _, mask_T = random_routing()
    means = scores_TE[mask_T.bool()].mean(0)
    assert_close(losses.squared_deviation_loss(scores_TE, mask_T), sum((1 / 6 - mean) ** 2 for mean in means), 1e-6)
    assert losses.squared_deviation_loss(torch.full((4, 6), 1 / 6)) == pytest.approx(0, abs=1e-12)


def test_group_divergence():
    scores_TE, _, mask_T = random_routing()
    mean = scores_TE[mask_T.bool()].mean(0)
    expected = F.kl_div(mean.log(), torch.full((6,), 1 / 6), reduction="sum") / 6
    assert_close(losses.group_divergence_loss(scores_TE, mask_T), expected, 1e-5)
    assert losses.group_divergence_loss(torch.full((4, 6), 1 / 6)) == pytest.approx(0, abs=1e-7)


def test_heterogeneous_loss():
    """Switch's if all experts count alike; else at its minimum where feed-forwards get tau times the load of the others."""
    scores_TE, index_TK, mask_T = random_routing()
    counts_E = losses.count_choices(index_TK, 6, mask_T)
    alike = losses.heterogeneous_loss(scores_TE, counts_E, 4, 1.0, mask_T)
    assert_close(alike, losses.switch_loss(scores_TE, counts_E, mask_T), 1e-6)
    tau = 0.5
    best = torch.tensor([tau] * 4 + [1.0] * 2) / (4 * tau + 2)
    at_best = losses.heterogeneous_loss(best[None], best, 4, tau)
    assert at_best == pytest.approx(tau * 6 / (4 * tau + 2))
    for seed in range(20):
        other = torch.randn(6, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        assert losses.heterogeneous_loss(other[None], other, 4, tau) >= at_best


def test_certain_tokens_have_a_gradient_of_entropy():
    """Scores of 0 are what the loss wants: the derivative of p log p must not be infinite there."""
    logits_TE = torch.tensor([[0.0, 200.0, -torch.inf], [1.0, 2.0, 3.0]], requires_grad=True)
    losses.entropy_loss(logits_TE.softmax(-1)).backward()
    assert logits_TE.grad.isfinite().all()
    exact = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    torch.distributions.Categorical(logits=exact).entropy().sum().backward()
    assert_close(logits_TE.grad[1], exact.grad[0] / 2, 1e-5)
