# SPDX-License-Identifier: Apache-2.0
"""The fused experts beside transformers' own dense feed-forward."""

import pytest
import torch
from conftest import assert_close, dense_config, moe_class, moe_config
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_moe.models.experts import MoeExperts, build_experts


def make_experts(implementation="eager", **values) -> MoeExperts:
    config = moe_config("llama", **values)
    config._experts_implementation = implementation
    experts = MoeExperts(config, config.num_experts)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


@torch.no_grad()
def test_each_expert_is_a_dense_feed_forward():
    experts = make_experts()
    mlp = LlamaMLP(dense_config("llama", intermediate_size=24))
    hidden_states = torch.randn(7, 32)
    for expert in range(4):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        mlp.gate_proj.weight.copy_(gate), mlp.up_proj.weight.copy_(up)
        mlp.down_proj.weight.copy_(experts.down_proj[expert])
        output = experts(hidden_states, torch.full((7, 1), expert), torch.full((7, 1), 0.5))
        assert_close(output, 0.5 * mlp(hidden_states), 1e-6)


@torch.no_grad()
def test_a_skipped_slot_adds_nothing():
    experts = make_experts()
    hidden_states = torch.randn(3, 32)
    weights = torch.rand(3, 2)
    skipped = torch.tensor([[0, 4], [1, 4], [4, 4]])
    kept = experts(hidden_states, skipped[:, :1], weights[:, :1])
    assert torch.equal(experts(hidden_states, skipped, weights), kept)
    assert kept[2].abs().max() == 0


def test_registration_order_is_pefts():
    assert [name for name, _ in make_experts().named_parameters()] == ["gate_up_proj", "down_proj"]


@torch.no_grad()
def test_equal_experts_equal_one_in_bfloat16():
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        experts = make_experts(implementation).to(torch.bfloat16)
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        hidden_states = torch.randn(64, 32).to(torch.bfloat16)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(64)])
        weights = torch.rand(64, 2)
        weights = weights / weights.sum(-1, keepdim=True)
        single = experts(hidden_states, torch.zeros(64, 1, dtype=torch.long), torch.ones(64, 1))
        assert torch.equal(experts(hidden_states, index, weights), single), implementation


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_inside_the_experts(family, implementation):
    """Switch's, between the two layers: in training alone, with the mean unchanged, none of it outside."""
    config = moe_config(family, expert_dropout=0.4, num_experts=2)
    config._experts_implementation = implementation
    experts = build_experts(config, 2)
    width = experts.intermediate_dim
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.zero_()
            if name in ("gate_up_proj", "up_proj"):
                parameter[..., 0] = 1.0
            elif name == "down_proj":
                parameter.copy_(torch.eye(32, width).expand_as(parameter))
    states = torch.zeros(4000, 32)
    states[:, 0] = 1.0
    index, weights = torch.arange(4000)[:, None] % 2, torch.ones(4000, 1)
    plain = experts.eval()(states, index, weights)
    torch.manual_seed(0)
    dropped = experts.train()(states, index, weights)[:, :24]
    assert ((dropped == 0) | (dropped - plain[:, :24] / 0.6).abs().lt(1e-5)).all()
    assert (dropped == 0).float().mean() == pytest.approx(0.4, abs=0.01)


def test_experts_can_start_as_switchs():
    model = moe_class("llama", "ForCausalLM")(moe_config("llama", moe_initializer_scale=0.1, num_experts=16))
    for name, fan_in in (("gate_up_proj", 32), ("down_proj", 24)):
        values = getattr(model.model.layers[0].mlp.experts, name)
        std = (0.1 / fan_in) ** 0.5
        assert values.abs().max() <= 2 * std
        assert float(values.detach().std()) == pytest.approx(0.88 * std, rel=0.03)


def test_kernels_that_cannot_drop_out_are_refused():
    model = moe_class("llama", "ForCausalLM")(moe_config("llama", expert_dropout=0.1))
    with pytest.raises(ValueError, match=r"`expert_dropout` \(0.1\).*sonicmoe"):
        model.set_experts_implementation("sonicmoe")
