# SPDX-License-Identifier: Apache-2.0
"""ExpertLoraConfig beside PEFT's LoraConfig: the names and ranks it finds, its files in PEFT, and what it refuses."""

import json
import warnings

import pytest
import torch
from conftest import assert_close, moe_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, ParamWrapper
from small_adapters import Dequantized, fill, ids, loss_and_gradients, targets, with_adapter
from small_models import ALL, small_moe
from torch.nn.utils import parametrize

from hf_moe import ExpertLoraConfig, enable_grouped_lora
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.grouped_lora import expert_wrappers
from hf_moe.adapters.param_wrapper import GroupedParamWrapper


ATTENTION = ["q_proj", "v_proj"]


def adapted(kind: str, seed: int = 0, **values) -> PeftModel:
    """A small model with an adapter from an ExpertLoraConfig, every factor with values that may have some."""
    model = small_moe(kind)
    torch.manual_seed(seed)
    return get_peft_model(model, ExpertLoraConfig(**values).for_model(model))


@pytest.mark.parametrize("kind", ALL)
def test_files_are_those_of_peft(kind, tmp_path):
    model = small_moe(kind)
    torch.manual_seed(0)
    vanilla = get_peft_model(model, LoraConfig(r=3, target_modules=[], target_parameters=targets(model)))
    vanilla.save_pretrained(tmp_path / "theirs")
    ours = adapted(kind, r=3)
    assert {type(wrapper) for _, wrapper in expert_wrappers(ours)} == {GroupedParamWrapper}
    ours.save_pretrained(tmp_path / "ours")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "moe_llama"])
@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ATTENTION, "expert_rank": "r//top_k"},
        {"target_modules": ".*self_attn.*_proj", "expert_rank": 3, "use_rslora": True},
        {"target_modules": ATTENTION, "expert_rank": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}},
        {"target_experts": ["down_proj"], "expert_rank": "r//num_experts"},
        {"lora_dropout": 0.2, "expert_dropout": 0.1, "target_modules": ATTENTION},
        {"train_router": True},
        {"layers_to_transform": [1], "target_modules": ATTENTION},
        {"expert_rank": [0, 1, 4, 2]},
    ],
    ids=lambda values: "-".join(values),
)
def test_peft_loads_it_without_hf_moe(kind, values, tmp_path):
    ours = fill(adapted(kind, **{"r": 4, "lora_alpha": 6, **values}), 1)
    ours.save_pretrained(tmp_path)
    assert not set(json.loads((tmp_path / "adapter_config.json").read_text())) & {"target_experts", "expert_rank"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        vanilla = PeftModel.from_pretrained(small_moe(kind), tmp_path)
    assert {type(module) for module in vanilla.modules() if isinstance(module, ParamWrapper)} == {ParamWrapper}
    assert_close(ours.eval()(ids()).logits, vanilla(ids()).logits)


def ranks_and_scalings(model: PeftModel, kind: type) -> set[tuple[int, float]]:
    found = [module for module in model.modules() if isinstance(module, kind)]
    return {(module.r["default"], round(module.scaling["default"], 6)) for module in found}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("kind", "target_modules"),
    [
        ("mixtral", ATTENTION),
        ("mixtral", ".*_proj"),
        ("qwen2_moe", ["down_proj"]),  # a name that the experts have too
        ("nemotron_h", ["up_proj", "down_proj"]),
    ],
)
def test_ranks_and_scaling(kind, target_modules, use_rslora):
    values = {"r": 8, "lora_alpha": 12, "expert_rank": 2, "use_rslora": use_rslora}
    model = adapted(kind, target_modules=target_modules, **values)
    assert ranks_and_scalings(model, Linear) == {(8, round(12 / 8**0.5, 6) if use_rslora else 1.5)}
    # The factor in front of the product stays what was written: alpha / r, or alpha / sqrt(r).
    assert ranks_and_scalings(model, ParamWrapper) == {(2, round(12 / 8**0.5, 6) if use_rslora else 1.5)}


def test_experts_with_ranks_of_their_own_stay_within_them():
    ranks = {0: [0, 1, 4, 2], 2: [3, 3, 3, 3]}
    model = adapted("mixtral", r=8, expert_rank=ranks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        loss_and_gradients(model)
        optimizer.step()
    for _, wrapper in expert_wrappers(model):
        a = wrapper.lora_A["default"].weight.view(4, 4, -1)
        b = wrapper.lora_B["default"].weight.view(-1, 4, 4).permute(2, 1, 0)
        expected = ranks.get(wrapper.layer, [0] * 4)
        for factor in (a, b):
            assert factor.abs().amax(-1).gt(0).sum(-1).tolist() == expected


def test_only_the_layers_asked_for():
    model = adapted("qwen3_moe", r=4, layers_to_transform=[0, 2], target_modules=ATTENTION)
    assert {wrapper.layer for _, wrapper in expert_wrappers(model)} == {0, 2}
    _, gradients = loss_and_gradients(model)
    assert {int(name.split("layers.")[1][0]) for name in gradients} == {0, 2}


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss", "mixtral", "olmoe", "moe_llama", "nemotron_h"])
def test_all_linear_is_neither_router_nor_output(kind):
    model = small_moe(kind)
    config = ExpertLoraConfig(r=2, target_modules="all-linear").for_model(model)
    names = [name for name, module in get_peft_model(model, config).named_modules() if hasattr(module, "lora_A")]
    assert not [name for name in names if name.endswith((".gate", ".router", "lm_head"))]
    assert [name for name in names if "attn" in name or "mixer" in name]
    if kind == "qwen2_moe":
        assert [name for name in names if name.endswith("shared_expert.down_proj")]
        assert not [name for name in names if name.endswith("shared_expert_gate")]


def test_experts_whose_weights_are_computed():
    """As libraries keep experts in 4 bits; PEFT's own computation adds its product once more in every pass."""
    expected = adapted("mixtral", r=4)
    model = small_moe("mixtral")
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(layer.mlp.experts, name, Dequantized())
    model = get_peft_model(model, ExpertLoraConfig(r=4).for_model(model))
    fill(expected, 1)
    # PEFT nests the wrappers of such weights the other way round, so that the names of factors mean another projection.
    theirs, ours = (
        {(wrapper.layer, wrapper.parameter_name): wrapper for _, wrapper in expert_wrappers(of)}
        for of in (expected, model)
    )
    assert theirs.keys() == ours.keys()
    for key, wrapper in theirs.items():
        for factor in ("lora_A", "lora_B"):
            getattr(ours[key], factor).load_state_dict(getattr(wrapper, factor).state_dict())
    for _ in range(3):
        loss, _ = loss_and_gradients(model)
        expected_loss, _ = loss_and_gradients(expected)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        for key, wrapper in theirs.items():
            for factor in ("lora_A", "lora_B"):
                assert_close(
                    getattr(ours[key], factor)["default"].weight.grad, getattr(wrapper, factor)["default"].weight.grad
                )


def test_routers_are_trained_when_asked_for():
    ours = fill(adapted("mixtral", r=4, train_router=True), 1)
    model = small_moe("mixtral")
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    torch.manual_seed(0)
    vanilla = fill(get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=names)), 1)
    (loss, gradients), (expected_loss, expected) = (loss_and_gradients(of) for of in (ours, vanilla))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert [name for name in gradients if "mlp.gate.lora_A" in name]
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_dropout(use_reentrant):
    model = fill(adapted("mixtral", r=4, expert_dropout=0.3), 1).train()
    torch.manual_seed(3)
    loss, expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    found_loss, found = loss_and_gradients(model)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_dropout_of_experts_and_of_other_modules():
    model = adapted("mixtral", r=2, target_modules=ATTENTION, lora_dropout=0.2, expert_dropout=0.1)
    linear = next(module for module in model.modules() if isinstance(module, Linear))
    assert linear.lora_dropout["default"].p == 0.2
    assert {wrapper.lora_dropout["default"].p for _, wrapper in expert_wrappers(model)} == {0.1}


def test_what_was_written_comes_back(tmp_path):
    written = ExpertLoraConfig(
        r=8,
        lora_alpha=12,
        target_modules="all-linear",
        expert_rank={0: [1, 2, 0, 4], 2: [1, 1, 1, 1]},
        lora_dropout=0.2,
        expert_dropout=0.1,
    )
    model = small_moe("mixtral")
    config = written.for_model(model)
    fill(get_peft_model(model, config), 0).save_pretrained(tmp_path)
    read = ExpertLoraConfig.from_pretrained(tmp_path)
    for name in ("r", "lora_alpha", "target_modules", "expert_rank", "lora_dropout", "expert_dropout", "rank_pattern"):
        assert getattr(read, name) == getattr(written, name), name
    base = small_moe("mixtral")
    again = PeftModel.from_pretrained(base, tmp_path, config=read.for_model(base), is_trainable=True)
    assert {type(wrapper) for _, wrapper in expert_wrappers(again)} == {GroupedParamWrapper}
    assert {wrapper.lora_dropout["default"].p for _, wrapper in expert_wrappers(again)} == {0.1}
    assert_close(again.eval()(ids()).logits, model.eval()(ids()).logits)
    with_adapter(small_moe("mixtral")).save_pretrained(tmp_path / "plain")
    with pytest.raises(ExpertLoraError, match="was not made with an ExpertLoraConfig.*enable_grouped_lora"):
        ExpertLoraConfig.from_pretrained(tmp_path / "plain")


def test_a_second_adapter():
    model = adapted("mixtral", r=2)
    model.add_adapter("wide", ExpertLoraConfig(r=8, expert_rank=[8, 1, 0, 0], expert_dropout=0.1).for_model(model))
    model.set_adapter("wide")
    for _, wrapper in expert_wrappers(model):
        assert wrapper.lora_A["wide"].weight.view(4, 8, -1).abs().amax(-1).gt(0).sum(-1).tolist() == [8, 1, 0, 0]
        assert (wrapper.lora_dropout["wide"].p, wrapper.lora_dropout["default"].__class__.__name__) == (
            0.1,
            "Identity",
        )


def test_active_adapters_with_different_dropout_are_refused():
    model = adapted("mixtral", r=2, expert_dropout=0.2)
    model.add_adapter("other", ExpertLoraConfig(r=2, expert_dropout=0.1).for_model(model))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ExpertLoraError, match=r"different dropout.*'default': 0.2, 'other': 0.1"):
        model.train()(ids())
    model.eval()(ids())


def test_an_adapter_beside_one_that_peft_computes():
    model = with_adapter(small_moe("mixtral"))
    with pytest.raises(ExpertLoraError, match=r"adapter that PEFT computes.*enable_grouped_lora\(model\)"):
        ExpertLoraConfig(r=2).for_model(model)
    config = ExpertLoraConfig(r=4, expert_rank=[0, 1, 4, 2], target_modules="all-linear").for_model(
        enable_grouped_lora(model)
    )
    assert not [name for name in config.target_modules if "lora" in name]
    model.add_adapter("other", config)
    for _, wrapper in expert_wrappers(model):
        assert wrapper.lora_A["other"].weight.view(4, 4, -1).abs().amax(-1).gt(0).sum(-1).tolist() == [0, 1, 4, 2]


def test_a_configuration_for_another_model():
    config = ExpertLoraConfig(r=2, expert_dropout=0.1).for_model(small_moe("mixtral"))
    model = get_peft_model(small_moe("qwen3_moe"), config)
    assert {wrapper.lora_dropout["default"].p for _, wrapper in expert_wrappers(model)} == {0.1}
    config = ExpertLoraConfig(expert_rank=[1, 2, 0, 1]).for_model(small_moe("mixtral"))
    with pytest.raises(ExpertLoraError, match="made for another model: it has no 8 ranks for layer 0"):
        get_peft_model(small_moe("qwen3_moe", num_experts=8), config)


def test_a_file_that_another_adapter_was_saved_over(tmp_path):
    adapted("mixtral", r=4, expert_rank=[2, 0, 1, 2]).save_pretrained(tmp_path)
    with_adapter(small_moe("mixtral"), r=3).save_pretrained(tmp_path)
    with pytest.raises(ExpertLoraError, match=r"hf_moe.json of .* belongs to another adapter.*Delete that file"):
        ExpertLoraConfig.from_pretrained(tmp_path)


def test_all_linear_takes_modules_with_numbers_for_names():
    model = small_moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate_extra = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = ExpertLoraConfig(r=2, target_modules="all-linear").for_model(model)
    assert "mlp.gate_extra.0" in config.target_modules


def test_saving_a_configuration_that_knows_no_model(tmp_path):
    written = ExpertLoraConfig(r=4, expert_dropout=0.1)
    written.save_pretrained(tmp_path)
    assert ExpertLoraConfig.from_pretrained(tmp_path).expert_dropout == 0.1


def test_unloading_restores_the_experts_implementation():
    for leave in ("unload", "merge_and_unload"):
        base = small_moe("mixtral")
        base.set_experts_implementation("batched_mm")
        model = get_peft_model(base, ExpertLoraConfig(r=2).for_model(base))
        assert base.config._experts_implementation == "lora_grouped_mm"
        assert getattr(model, leave)().config._experts_implementation == "batched_mm"


def test_adapters_of_transformers():
    model = small_moe("mixtral")
    model.add_adapter(ExpertLoraConfig(r=2, target_modules=ATTENTION).for_model(model))
    assert {type(wrapper) for _, wrapper in expert_wrappers(model)} == {GroupedParamWrapper}


def test_a_configuration_without_a_model_is_refused():
    config = ExpertLoraConfig(r=2)
    model = small_moe("mixtral")
    for use in (lambda: get_peft_model(model, config), lambda: model.add_adapter(config)):
        with pytest.raises(ExpertLoraError, match=r"does not know the model.*config\.for_model\(model\)"):
            use()
    assert not [module for module in model.modules() if isinstance(module, ParamWrapper)]
    with pytest.raises(ExpertLoraError, match="made for a model already"):
        config.for_model(model).for_model(model)


def test_another_experts_implementation_is_refused():
    model = adapted("mixtral", r=2)
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(ExpertLoraError, match=r"'eager'.*enable_grouped_lora\(model\)"):
        model(ids())
    enable_grouped_lora(model)(ids())


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("mixtral", {"r": 0}, "r is 0. A rank is a whole number of at least 1"),
        ("mixtral", {"r": 2.5}, "r is 2.5. A rank is a whole number"),
        ("mixtral", {"expert_rank": 0}, "expert_rank 0 is 0.*at least 1"),
        ("mixtral", {"expert_rank": 2.5}, "expert_rank 2.5 is 2.5.*whole number"),
        ("mixtral", {"expert_rank": None}, "expert_rank None.*whole number"),
        ("mixtral", {"expert_rank": [1, "a", 1, 1]}, r"\[1, 'a', 1, 1\].*whole number"),
        ("mixtral", {"expert_rank": {0: None}}, "has None. A list has"),
        ("mixtral", {"target_experts": 5}, "target_experts is 5"),
        ("mixtral", {"expert_dropout": "a"}, "expert_dropout is 'a'"),
        (
            "mixtral",
            {"expert_rank": 2, "rank_pattern": {"down_proj": 2}},
            "rank_pattern has 'down_proj'.*`expert_rank`",
        ),
        ("mixtral", {"exclude_modules": ["layers.0.mlp.experts"]}, "exclude_modules.*layers_to_transform"),
        (
            "mixtral",
            {"r": 2, "expert_rank": "r//num_experts"},
            r"'r//num_experts' is 0 with r=2, 4 experts.*larger `r`",
        ),
        ("mixtral", {"expert_rank": "r/2"}, "'r/2', which is no rank.*'r//top_k'"),
        ("mixtral", {"expert_rank": [1, 2]}, "2 ranks for layer 0, but there are 4 experts"),
        ("mixtral", {"expert_rank": [1, 2, -1, 0]}, "whole number"),
        ("mixtral", {"expert_rank": [0, 0, 0, 0]}, "0 for every expert"),
        ("mixtral", {"expert_rank": {7: [1, 1, 1, 1]}}, r"layer 7; experts are in the layers \[0, 1, 2\]"),
        ("mixtral", {"expert_dropout": 1.0}, "expert_dropout is 1.0"),
        ("mixtral", {"target_experts": ["w1"]}, r"\['w1'\].*down_proj, gate_up_proj"),
        ("mixtral", {"target_experts": []}, "down_proj, gate_up_proj"),
        ("mixtral", {"target_parameters": ["mlp.experts.down_proj"]}, "finds the parameters itself"),
        ("mixtral", {"target_modules": ["q_proj", "gate"]}, "catches the router 'model.layers.0.mlp.gate'"),
        ("mixtral", {"target_modules": ["w1", "w3"]}, r"PEFT takes module names among \['w1', 'w3'\]"),
        ("mixtral", {"target_modules": ["w1"]}, r"PEFT takes module names among \['w1'\]"),
        ("qwen3_moe", {"target_modules": ["q_proj", "up_proj"]}, "PEFT takes module names among.*'up_proj'"),
        (
            "mixtral",
            {"target_modules": ["q_proj", "gate_proj"]},
            "has 'gate_proj', but no module of MixtralForCausalLM",
        ),
        ("mixtral", {"target_modules": ["query"]}, "has 'query', but no module of MixtralForCausalLM"),
        ("deepseek_v3", {"target_modules": "all-linear"}, "PEFT takes module names among.*shared_experts.gate_proj"),
        ("moe_gpt2", {"target_modules": ["c_attn"]}, "'transformer.h.0.attn.c_attn'.*Conv1D.*leave such modules out"),
        ("mixtral", {"layers_to_transform": [0, 9]}, r"has 9, but experts are in the layers \[0, 1, 2\]"),
        ("mixtral", {"train_router": True, "lora_dropout": 0.1}, "no dropout for a router"),
    ],
)
def test_what_is_refused(kind, values, message):
    with pytest.raises(ExpertLoraError, match=message):
        ExpertLoraConfig(**{"r": 4, **values}).for_model(small_moe(kind))


def test_routers_that_are_no_matrix_are_not_adapted():
    model = small_moe("mixtral")
    model.model.layers[1].mlp.gate.weight = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(
        ExpertLoraError, match=r"layers.1.mlp.gate \(MixtralTopKRouter\) is no matrix.*`modules_to_save`"
    ):
        ExpertLoraConfig(r=2, train_router=True).for_model(model)


def test_models_whose_experts_cannot_be_reached_are_refused():
    dense = moe_model("llama").model.embed_tokens
    with pytest.raises(ExpertLoraError, match="Embedding has no layer of experts"):
        ExpertLoraConfig(r=2).for_model(dense)
    model = small_moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ExpertLoraError, match="down_proj is of type torch.float8_e4m3fn.*dequantize=True"):
        ExpertLoraConfig(r=2).for_model(model)


def test_experts_without_an_experts_implementation_are_refused():
    import transformers
    from conftest import TINY

    config = transformers.Llama4TextConfig(
        **{**TINY, "intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8, "pad_token_id": 0}
    )
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(ExpertLoraError, match="class Llama4TextExperts, which is not written for"):
        ExpertLoraConfig(r=2).for_model(model)
