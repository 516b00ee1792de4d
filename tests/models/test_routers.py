# SPDX-License-Identifier: Apache-2.0
"""The contract of the routers."""

import pytest
import torch
import transformers
from conftest import moe_config, moe_model

from hf_moe.models.routers import ROUTERS, MoeRouter


@pytest.mark.parametrize("router_type", sorted(ROUTERS))
def test_contract(router_type):
    config = moe_config("llama", router_type=router_type)
    router = ROUTERS[router_type](config, config.num_experts)
    torch.nn.init.normal_(router.weight)
    router.to(torch.bfloat16)
    logits, weights, index = router(torch.randn(2, 5, 32, dtype=torch.bfloat16))
    assert isinstance(router, MoeRouter)
    assert logits.shape == (10, 4)
    assert weights.shape == index.shape == (10, 2)
    assert weights.dtype == torch.float32, "weights are rounded at the combine, not before"
    assert not index.is_floating_point()
    assert ((index >= 0) & (index <= 4)).all()


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_softmax_topk_in_closed_form(norm_topk_prob):
    router = ROUTERS["softmax_topk"](moe_config("llama", norm_topk_prob=norm_topk_prob), 4)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    hidden_states = torch.zeros(1, 32)
    hidden_states[0, 0] = 1.0
    _, weights, index = router(hidden_states)
    assert index.tolist() == [[3, 2]]
    exponentials = torch.exp(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    expected = exponentials[[3, 2]] / (exponentials[[3, 2]].sum() if norm_topk_prob else exponentials.sum())
    torch.testing.assert_close(weights[0], expected)


def test_all_experts_chosen_is_the_soft_mixture():
    router = ROUTERS["softmax_topk"](moe_config("llama", num_experts_per_tok=4, norm_topk_prob=False), 4)
    torch.nn.init.normal_(router.weight)
    hidden_states = torch.randn(6, 32)
    logits, weights, index = router(hidden_states)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, index))


def test_the_bias_chooses_and_does_not_weigh():
    """Beside DeepSeek-V3's way to choose, with softmax for sigmoid and no groups."""
    config = moe_config("llama", use_expert_bias=True, norm_topk_prob=False)
    router = ROUTERS["softmax_topk"](config, 4)
    torch.nn.init.normal_(router.weight)
    hidden_states = torch.randn(50, 32)
    router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    logits, weights, index = router(hidden_states)
    scores = logits.softmax(-1)
    for token in range(50):
        expected = sorted(
            range(4), key=lambda expert: -(scores[token, expert] + router.e_score_correction_bias[expert])
        )[:2]
        assert index[token].tolist() == expected
        torch.testing.assert_close(weights[token], scores[token, expected])


def test_a_bias_of_zero_changes_nothing_and_is_saved_in_float32(tmp_path, batch):
    plain = moe_model("llama")
    plain.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", use_expert_bias=True, dtype=torch.bfloat16
    )
    gates = [module for module in loaded.modules() if isinstance(module, MoeRouter)]
    assert {gate.e_score_correction_bias.dtype for gate in gates} == {torch.float32}
    assert not any(gate.e_score_correction_bias.any() for gate in gates)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(loaded(**batch).logits, expected(**batch).logits)
    gates[0].e_score_correction_bias.fill_(0.123)
    loaded.save_pretrained(tmp_path / "biased")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "biased", dtype=torch.bfloat16)
    assert torch.equal(
        next(m for m in again.modules() if isinstance(m, MoeRouter)).e_score_correction_bias,
        gates[0].e_score_correction_bias,
    )
