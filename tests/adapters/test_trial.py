# SPDX-License-Identifier: Apache-2.0
"""A forward and a backward pass show whether an adapter does something, and which experts learn."""

import pytest
import torch
from conftest import moe_model
from peft import LoraConfig, PeftModel, get_peft_model
from small_adapters import ids, with_adapter
from small_models import small_moe

from hf_moe import ExpertLoraConfig, enable_grouped_lora
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.trial import try_adapter


def trial(model: PeftModel, tokens: torch.Tensor | None = None) -> dict[str, tuple[str, str, str]]:
    checks = try_adapter(model, ids(8, 32) if tokens is None else tokens)
    return {check.name: (check.status, check.found, check.details) for check in checks}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_trial_of_an_adapter_that_works(kind, grouped):
    model = with_adapter(small_moe(kind))
    found = trial(enable_grouped_lora(model) if grouped else model)
    pairs = 4 * sum("experts" in name and ".lora_A." in name for name, _ in model.named_parameters())
    assert found["logits"][0] == "ok"
    assert found["expert gradients"][:2] == ("ok", f"in {pairs} of {pairs} factor pairs of experts")


def test_a_trial_measures_the_effect():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral"))).eval()
    tokens = ids()
    with torch.no_grad():
        changed = model(tokens).logits
        expected = small_moe("mixtral").eval()(tokens).logits
    relative = ((changed - expected).abs().max() / expected.abs().max()).item()
    status, found, _ = trial(model, tokens)["logits"]
    assert status == "ok"
    assert found.startswith(f"changed by {relative:.1e} of the largest, by rounding ")
    assert 1e-8 < float(found.split()[-1]) < 1e-5


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 0), (torch.float32, 1e-7), (torch.bfloat16, 3e-3)])
def test_an_effect_as_small_as_rounding_is_none(dtype, factor):
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")))
    for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
        parameter.data.mul_(factor)
    status, _, why = trial(model.to(dtype))["logits"]
    assert status == "problem"
    assert f"and rounding in {dtype} by" in why
    assert trial(with_adapter(small_moe("mixtral")).to(dtype))["logits"][0] == "ok"


def test_a_trial_finds_experts_and_modules_without_a_gradient():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral"), target_modules=["q_proj", "v_proj"]))
    layer = model.get_base_model().model.layers[1]
    wrapper = layer.mlp.experts
    wrapper.lora_A["default"].weight.register_hook(
        lambda g: g.view(4, -1).index_fill(0, torch.tensor([1, 2]), 0).view_as(g)
    )
    wrapper.lora_B["default"].weight.register_hook(
        lambda g: g.view(-1, 3, 4).index_fill(2, torch.tensor([1, 2]), 0).view_as(g)
    )
    for parameter in layer.self_attn.v_proj.parameters():
        parameter.requires_grad_(False)
    found = trial(model)
    assert found["expert gradients"][0] == "problem"
    assert "mlp.experts.down_proj in layer 1: 1-2" in found["expert gradients"][2]
    assert found["other gradients"][1] == "none for 1 of 6 modules"
    assert "model.layers.1.self_attn.v_proj" in found["other gradients"][2]


def test_gradients_that_are_missing_or_not_finite():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")))
    layers = model.get_base_model().model.layers
    layers[0].mlp.experts.lora_A.requires_grad_(False)
    layers[0].mlp.experts.lora_B.requires_grad_(False)
    for factors in (layers[2].mlp.experts.lora_A, layers[2].mlp.experts.lora_B):
        factors["default"].weight.register_hook(lambda gradient: gradient * float("nan"))
    why = trial(model)["expert gradients"][2]
    assert "mlp.experts.down_proj in layer 0: 0-3, layer 2: 0-3. They would not train" in why


def test_a_trial_names_experts_that_got_no_token():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")))
    status, found, why = trial(model, torch.tensor([[5]]))["expert gradients"]
    assert (status, found) == ("warning", "in 12 of 24 factor pairs of experts")  # 2 of 4 experts in 3 layers, twice
    assert "No token came to some experts" in why
    assert "layer 0: " in why
    model = small_moe("mixtral")
    model = get_peft_model(model, ExpertLoraConfig(r=2, expert_rank=[0, 0, 2, 2]).for_model(model))
    assert trial(model)["expert gradients"][:2] == ("ok", "in 12 of 12 factor pairs of experts")


def test_a_trial_of_images_is_refused():
    model = get_peft_model(moe_model("vit", head="ForImageClassification"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExpertLoraError, match="takes pixel_values, and only models of text"):
        try_adapter(model, ids())
