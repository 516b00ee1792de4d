# SPDX-License-Identifier: Apache-2.0
"""The report of what will train, beside PEFT's own count and beside what an optimizer step changes."""

import copy
import json

import peft
import pytest
import torch
import transformers
from conftest import TINY, dense_model
from peft import LoraConfig, get_peft_model
from small_adapters import ids, targets, with_adapter
from small_models import ALL, small_moe

from hf_moe import ExpertLoraConfig, ExpertSelection, apply_esft, enable_grouped_lora, expert_lora_report
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.inventory import Target


ATTENTION = ["q_proj", "v_proj"]
RANKS = {0: [0, 1, 4, 2], 2: [3, 3, 3, 3]}


def adapted(kind: str = "mixtral", **values) -> peft.PeftModel:
    model = small_moe(kind)
    return get_peft_model(model, ExpertLoraConfig(**{"r": 4, **values}).for_model(model))


def find(model: torch.nn.Module, name: str) -> list[Target]:
    return [target for target in expert_lora_report(model).targets if target.name.endswith(name)]


@pytest.mark.parametrize("kind", ALL)
def test_every_layout(kind):
    model = adapted(kind, target_modules=ATTENTION if kind in ("mixtral", "gpt_oss") else None)
    report = expert_lora_report(model)
    trainable, total = model.get_nb_trainable_parameters()
    assert (report.num_trainable_parameters, report.num_parameters) == (trainable, total - trainable)
    experts = [target for target in report.targets if target.kind == "experts"]
    assert {target.name for target in experts} == {
        ".".join(name.split(".")[-3:]) for name in targets(small_moe(kind))
    } - {"mlp.gate"}
    assert {target.backend for target in experts} == {"hf_moe"}
    assert [target.training for target in report.targets if target.kind == "router"] == ["frozen"]
    assert report.warnings == []
    json.dumps(report.to_dict())


def test_ranks_scaling_and_dropout():
    model = adapted(
        r=8, lora_alpha=12, expert_rank="r//top_k", target_modules=ATTENTION, lora_dropout=0.05, expert_dropout=0.1
    )
    (experts,) = find(model, "gate_up_proj")
    assert experts.ranks == {layer: [4] * 4 for layer in range(3)}
    assert (experts.scaling, experts.dropout, experts.num_experts) == ([1.5, 1.5], 0.1, 4)
    (query,) = find(model, "q_proj")
    assert (query.ranks, query.scaling, query.dropout, query.backend) == (
        {layer: [8] for layer in range(3)},
        [1.5, 1.5],
        0.05,
        "PEFT",
    )


def test_only_what_changes_in_a_step_is_counted():
    """Experts of rank 0 and layers left out stay as they are under an optimizer; the report says so beforehand."""
    model = adapted(r=8, expert_rank=RANKS, target_modules=["q_proj"])
    report = expert_lora_report(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # in the first step the gradient of A is zero, since B is
        model(input_ids=ids(8, 32), labels=ids(8, 32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = sum(int((tensor != before[name]).sum()) for name, tensor in model.state_dict().items())
    assert report.num_trainable_parameters == changed
    trains, is_zero = find(model, "down_proj")
    assert (trains.ranks, trains.layers) == (RANKS, [0, 2])
    assert (is_zero.training, is_zero.layers, is_zero.num_parameters) == ("LoRA, all zero", [1], 0)


def test_the_table():
    text = str(expert_lora_report(adapted(expert_rank=RANKS, expert_dropout=0.1, target_modules=["q_proj"])))
    lines = text.splitlines()
    assert lines[0] == "MixtralForCausalLM: 4,720 parameters will train, 6.62% of 71,264"
    assert lines[2].split() == [
        "TARGET",
        "LAYERS",
        "TRAINING",
        "EXPERTS",
        "RANK",
        "SCALING",
        "DROPOUT",
        "PARAMETERS",
        "BACKEND",
    ]
    rows = [" ".join(line.split()) for line in lines[4:]]
    assert "mlp.experts.gate_up_proj 0, 2 LoRA 3-4 of 4 1-4 2 0.1 2,432 hf_moe" in rows
    assert "mlp.experts.gate_up_proj 1 LoRA, all zero 0 of 4 2 0.1 0 hf_moe" in rows
    assert "mlp.gate all 3 frozen 0" in rows
    assert "self_attn.q_proj all 3 LoRA 4 2 768 PEFT" in rows
    assert "Frozen besides: lm_head, model.embed_tokens, self_attn.k_proj, self_attn.o_proj, self_attn.v_proj" in rows
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_that_esft_chose(kind):
    model = small_moe(kind)
    parameters = model.num_parameters()
    apply_esft(model, ExpertSelection({0: [1], 2: [0, 3]}))
    report = expert_lora_report(model)
    assert report.num_parameters == parameters
    assert report.num_trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.warnings == []
    chosen, others = find(model, "down_proj")
    assert (chosen.training, chosen.experts, chosen.num_experts) == ("in full", {0: [1], 2: [0, 3]}, 4)
    assert (others.training, others.experts, others.layers) == ("frozen", {1: []}, [1])
    rows = [" ".join(line.split()) for line in str(report).splitlines()]
    assert any(row.startswith("mlp.experts.down_proj 0, 2 in full 1-2 of 4 ") for row in rows)
    assert "mlp.experts.down_proj 1 frozen 0 of 4 0" in rows


def test_experts_without_an_adapter_are_said():
    report = expert_lora_report(adapted(layers_to_transform=[0, 2], target_experts=["down_proj"]))
    left_out = {target.name: target.layers for target in report.targets if target.training == "NOT ADAPTED"}
    assert left_out == {"mlp.experts.gate_up_proj": [0, 1, 2], "mlp.experts.down_proj": [1]}
    (warning,) = report.warnings
    assert "adapter: mlp.experts.gate_up_proj in layers 0-2; mlp.experts.down_proj in layer 1." in warning
    report = expert_lora_report(get_peft_model(small_moe("gpt_oss"), LoraConfig(target_modules="all-linear")))
    assert [target.training for target in report.targets if target.kind == "experts"] == ["NOT ADAPTED"] * 2
    (warning,) = report.warnings
    assert "No expert is adapted" in warning
    assert "'all-linear' miss experts" in warning


def test_routers_that_are_caught_by_accident():
    report = expert_lora_report(get_peft_model(small_moe("mixtral"), LoraConfig(target_modules="all-linear")))
    (router,) = [target for target in report.targets if target.kind == "router"]
    assert (router.name, router.training) == ("mlp.gate.weight", "LoRA")
    assert [warning for warning in report.warnings if "The routers (mlp.gate.weight) have adapters" in warning]
    meant = expert_lora_report(adapted(train_router=True))
    assert [target.training for target in meant.targets if target.kind == "router"] == ["LoRA"]
    assert meant.warnings == []


def test_routers_and_modules_that_are_trained_in_full():
    model = adapted(modules_to_save=["lm_head", "mlp.gate"])
    report = expert_lora_report(model)
    full = {target.name: (target.kind, target.layers) for target in report.targets if target.training == "in full"}
    assert full == {"lm_head.weight": ("module", []), "mlp.gate.weight": ("router", [0, 1, 2])}
    assert report.num_trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert "lm_head" not in report.frozen
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert [target.training for target in find(model, "norm.weight")] == ["in full"]


def test_backend():
    model = with_adapter(small_moe("mixtral"))
    assert {target.backend for target in find(model, "proj")} == {"PEFT"}
    (warning,) = expert_lora_report(model).warnings
    assert "Call `enable_grouped_lora(model)`" in warning
    report = expert_lora_report(enable_grouped_lora(model))
    assert {target.backend for target in report.targets if target.kind == "experts"} == {"hf_moe"}
    assert report.warnings == []


def test_experts_of_classes_without_an_experts_implementation():
    config = transformers.Llama4TextConfig(
        **{**TINY, "intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8, "pad_token_id": 0}
    )
    model = transformers.Llama4ForCausalLM(config)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    report = expert_lora_report(model)
    (target,) = [target for target in report.targets if target.kind == "experts"]
    assert (target.backend, target.num_experts, target.layers) == ("PEFT", 4, [0, 1, 2])
    assert [warning for warning in report.warnings if "The class Llama4TextExperts leaves no other way" in warning]


def test_several_adapters():
    model = adapted(r=2)
    model.add_adapter("wide", ExpertLoraConfig(r=8).for_model(model))
    default, wide = find(model, "down_proj")
    assert (default.adapter, default.training, default.is_active) == ("default", "LoRA", True)
    assert (wide.adapter, wide.training, wide.is_active, wide.num_parameters) == ("wide", "LoRA, frozen", False, 0)
    assert "wide (inactive)" in str(expert_lora_report(model))
    model.base_model.set_adapter(["default", "wide"])
    assert [
        w for w in expert_lora_report(model).warnings if "Several adapters are active and add up: default, wide" in w
    ]


def test_what_keeps_an_adapter_from_training(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = enable_grouped_lora(peft.PeftModel.from_pretrained(small_moe("mixtral"), tmp_path))
    assert [w for w in expert_lora_report(model).warnings if "Nothing will train" in w and "is_trainable=True" in w]
    model.merge_adapter()
    assert [w for w in expert_lora_report(model).warnings if "Merged into the weights: default" in w]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert [w for w in expert_lora_report(model).warnings if "switched off" in w]


def test_adapters_of_transformers_and_wrapped_models():
    model = small_moe("mixtral")
    model.add_adapter(ExpertLoraConfig(r=2).for_model(model))
    report = expert_lora_report(model)
    assert report.model == "MixtralForCausalLM"
    assert expert_lora_report(torch.compile(model)).to_dict() == report.to_dict()


def test_models_without_experts_or_adapters_are_refused():
    with pytest.raises(ExpertLoraError, match="LlamaForCausalLM has no layer of experts"):
        expert_lora_report(dense_model("llama"))
    with pytest.raises(ExpertLoraError, match="MixtralForCausalLM has no LoRA adapters.*get_peft_model"):
        expert_lora_report(small_moe("mixtral"))
