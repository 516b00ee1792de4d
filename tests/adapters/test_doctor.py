# SPDX-License-Identifier: Apache-2.0
"""What is wrong with adapter files is found, against what PEFT itself makes of them, and files of older versions."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import dense_model, moe_model
from peft import LoraConfig, PeftModel, get_peft_model
from small_adapters import FILES, change, fill, with_adapter
from small_models import ALL, small_moe

from hf_moe import ExpertLoraConfig, ExpertSelection, apply_esft, check_adapter, save_esft
from hf_moe.adapters.doctor import diagnose
from hf_moe.adapters.errors import ExpertLoraError


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A trained adapter on the experts and the attention of a tiny Mixtral."""
    model = small_moe("mixtral")
    config = ExpertLoraConfig(r=4, target_modules=["q_proj"], expert_dropout=0.1).for_model(model)
    fill(get_peft_model(model, config), 1).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def results(diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in diagnosis.checks}


def details(diagnosis, name: str) -> str:
    return next(check.details for check in diagnosis.checks if check.name == name)


@pytest.mark.parametrize("kind", ALL)
def test_adapters_of_peft_pass(kind, tmp_path):
    with_adapter(small_moe(kind)).save_pretrained(tmp_path / "adapter")
    diagnosis = check_adapter(tmp_path / "adapter", small_moe(kind))
    assert set(results(diagnosis).values()) == {"ok"}
    assert diagnosis.report.num_parameters == small_moe(kind).num_parameters()
    assert [target.ranks for target in diagnosis.report.targets if target.kind == "experts"]
    json.dumps(diagnosis.to_dict())


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "v_proj"], "expert_rank": "r//top_k", "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": "all-linear", "expert_rank": {1: [0, 1, 2, 3]}},
        {"target_experts": ["down_proj"], "layers_to_transform": [0, 2], "modules_to_save": ["lm_head"]},
        {"train_router": True},
        {"target_modules": ["q_proj"], "use_dora": False, "lora_bias": False, "init_lora_weights": "gaussian"},
    ],
    ids=lambda values: "-".join(values),
)
def test_adapters_of_any_configuration_pass(values, tmp_path):
    model = small_moe("qwen3_moe")
    fill(get_peft_model(model, ExpertLoraConfig(r=4, **values).for_model(model)), 1).save_pretrained(tmp_path)
    assert not diagnose(tmp_path, small_moe("qwen3_moe")).problems


def test_folders_and_saved_models_will_do(adapter, tmp_path):
    small_moe("mixtral").save_pretrained(tmp_path / "moe")
    diagnosis = check_adapter(str(adapter), tmp_path / "moe")
    assert not diagnose(adapter, with_adapter(small_moe("mixtral"))).problems
    assert diagnosis.report.to_dict() == check_adapter(adapter, small_moe("mixtral")).report.to_dict()


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_classifiers(task, tmp_path):
    classifier = moe_model("llama", head="ForSequenceClassification")
    classifier.save_pretrained(tmp_path / "classifier")
    moe_model("llama").save_pretrained(tmp_path / "pretrained")
    config = LoraConfig(
        r=2, task_type=task, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False
    )
    get_peft_model(classifier, config).save_pretrained(tmp_path / "adapter")
    diagnosis = check_adapter(tmp_path / "adapter", tmp_path / ("pretrained" if task else "classifier"))
    assert diagnosis.report.model == "MoeLlamaForSequenceClassification"
    assert [target.training for target in diagnosis.report.targets if target.name == "score.weight"] == ["in full"]


def test_initial_values_that_depend_on_the_model_are_not_computed(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(small_moe("mixtral"), config).save_pretrained(tmp_path)
    change(tmp_path, init_lora_weights="corda")
    assert not diagnose(tmp_path, small_moe("mixtral")).problems


def test_models_that_hf_moe_cannot_run_are_said(adapter):
    model = small_moe("mixtral")
    model.config._experts_implementation = "sonicmoe"
    (warning,) = [text for text in check_adapter(adapter, model).report.warnings if "leaves" in text]
    assert "hf_moe leaves the adapters of the experts to PEFT" in warning
    assert "'sonicmoe'" in warning


def test_keys_that_do_not_match_are_refused(adapter):
    """PEFT loads such an adapter without an error, and the model computes as if there were none."""

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".mlp.experts.", ".block.experts.")] = tensors.pop(name)

    change(adapter, rename)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(small_moe("mixtral"), adapter)
    experts = [p for name, p in loaded.named_parameters() if "experts" in name and "lora_B" in name]
    assert not any(parameter.any() for parameter in experts)

    with pytest.raises(ExpertLoraError) as caught:
        check_adapter(adapter, small_moe("mixtral"))
    message = str(caught.value)
    assert (
        f"{adapter} cannot be used on MixtralForCausalLM:\n- keys: 12 of 18 tensors have no place in the model"
        in message
    )
    assert "model.layers.0.block.experts.base_layer.lora_A.weight" in message
    assert "12 of 18 tensors are missing in the file" in message
    assert "PEFT would leave them out without an error" in message


def test_tensors_that_are_missing_are_refused(adapter):
    change(adapter, lambda tensors: tensors.pop("base_model.model.model.layers.1.mlp.experts.lora_B.weight"))
    with pytest.raises(
        ExpertLoraError, match=r"keys: 1 of 18 tensors are missing .*layers\.1\.mlp\.experts\.lora_B.*download"
    ):
        check_adapter(adapter, small_moe("mixtral"))


def test_a_tensor_that_was_renamed_is_not_taken_for_another_model(adapter):
    name = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    change(adapter, lambda tensors: tensors.update({f"{name}s": tensors.pop(name)}))
    with pytest.raises(ExpertLoraError, match="1 of 18 tensors have no place.*All others fit.* download") as caught:
        check_adapter(adapter, small_moe("mixtral"))
    assert "another base model" not in str(caught.value)


def test_a_state_dict_that_was_saved_by_hand_is_refused(tmp_path):
    def insert_name(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    with_adapter(moe_model("llama")).save_pretrained(tmp_path)
    change(tmp_path, insert_name)
    with pytest.raises(ExpertLoraError, match="have an adapter's name in them: save with `save_pretrained`"):
        check_adapter(tmp_path, moe_model("llama"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 2}, "layers 0-2, and 0-1 are expected. The adapter is of another base model"),
        ({"num_hidden_layers": 4}, "layers 0-2, and 0-3 are expected. The adapter is of another base model"),
        ({"hidden_size": 64}, r"gate_up_proj \(input 32 instead of 64; layer 0-2\).*is of another base model"),
        ({"intermediate_size": 24}, r"down_proj \(input 48 instead of 24; layer 0-2\).*is of another base model"),
        (
            {"num_local_experts": 8},
            r"\(4 experts of rank 4 or 8 experts of rank 2 instead of 8 experts of rank 4; layer 0-2\).* another number of experts",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_adapters_of_another_base_model_are_refused(adapter, values, message):
    change(adapter, base_model_name_or_path="org/large-moe")
    with pytest.raises(ExpertLoraError, match=message) as caught:
        check_adapter(adapter, small_moe("mixtral", **values))
    assert "(org/large-moe, says adapter_config.json)" in str(caught.value)


def test_other_architectures_are_refused(adapter):
    """Experts of gpt-oss can have the same names and sizes, and compute something else."""
    with pytest.raises(ExpertLoraError, match="base model: .* made for a MixtralForCausalLM, .*modeling_gpt_oss"):
        check_adapter(adapter, small_moe("gpt_oss"))
    with pytest.raises(ExpertLoraError, match="targets: PEFT cannot put the adapter on the model.*made for"):
        check_adapter(adapter, transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2)))


def test_another_name_of_the_base_model_is_a_warning(adapter):
    change(adapter, base_model_name_or_path="org/moe")
    diagnosis = check_adapter(adapter, small_moe("mixtral"))
    assert results(diagnosis)["base model"] == "warning"
    assert "made for org/moe, and it was compared with MixtralForCausalLM" in details(diagnosis, "base model")


def test_ranks_that_are_not_those_of_the_configuration_are_refused(adapter):
    change(adapter, rank_pattern={"q_proj": 7})
    with pytest.raises(ExpertLoraError, match=r"q_proj \(rank 4 instead of 7; layer 0-2\).*`r` and `rank_pattern`"):
        check_adapter(adapter, small_moe("mixtral"))


@pytest.mark.parametrize("target", ["self_attn.q_proj", "mlp.experts"])
def test_factors_that_were_cut_are_refused(target, adapter):
    name = f"base_model.model.model.layers.1.{target}.lora_A.weight"
    change(adapter, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ExpertLoraError, match="have not the same rank, so the file is damaged"):
        check_adapter(adapter, small_moe("mixtral"))


def test_patterns_that_match_nothing_are_warnings(adapter):
    change(adapter, alpha_pattern={"q_proj": 7, "experts.gate_up_proj": 5})
    assert results(diagnose(adapter, small_moe("mixtral")))["patterns"] == "ok"
    change(adapter, alpha_pattern={"q_proj": 7, "experts.base_layer": 5})
    diagnosis = diagnose(adapter, small_moe("mixtral"))
    assert "alpha_pattern 'experts.base_layer', which match no target" in details(diagnosis, "patterns")
    assert "experts.base_layer" not in str(diagnosis.report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(adapter, value):
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    change(adapter, lambda tensors: tensors[name][3, 2].fill_(value))
    with pytest.raises(
        ExpertLoraError,
        match=f"values: {name.removeprefix('base_model.model.')}: values that are NaN or infinite.*earlier checkpoint",
    ):
        check_adapter(adapter, small_moe("mixtral"))


def test_adapters_without_effect_are_refused(adapter, tmp_path):
    model = small_moe("mixtral")
    get_peft_model(model, ExpertLoraConfig(r=4).for_model(model)).save_pretrained(tmp_path / "fresh")
    with pytest.raises(ExpertLoraError, match="effect: lora_B is zero everywhere.*changes nothing"):
        check_adapter(tmp_path / "fresh", small_moe("mixtral"))


def test_parts_without_effect_are_warnings(adapter):
    experts = "base_model.model.model.layers.{}.mlp.experts.lora_B.weight"
    change(adapter, lambda tensors: tensors[experts.format(1)].view(-1, 4, 4)[:, :, 2].zero_())
    diagnosis = check_adapter(adapter, small_moe("mixtral"))
    text = details(diagnosis, "effect")
    assert "1 of 24 factor pairs of experts have a lora_B of zero" in text
    assert "left out: mlp.experts.down_proj in layer 1: 2." in text
    change(adapter, lambda tensors: tensors[experts.format(2)].zero_())
    diagnosis = check_adapter(adapter, small_moe("mixtral"))
    assert "mlp.experts.down_proj in layer 2" in details(diagnosis, "effect")


def test_experts_that_were_left_out_are_no_warning(tmp_path):
    model = small_moe("mixtral")
    config = ExpertLoraConfig(r=4, expert_rank=[0, 1, 4, 2]).for_model(model)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # as training would
                parameter.view(-1, 4, 4).add_((torch.arange(4)[:, None] < torch.tensor([0, 1, 4, 2])) * 0.1)
    model.save_pretrained(tmp_path)
    diagnosis = check_adapter(tmp_path, small_moe("mixtral"))
    assert results(diagnosis)["effect"] == "ok"
    assert diagnosis.report.targets[0].ranks[1] == [0, 1, 4, 2]


def test_dropout_that_peft_refuses_is_found(adapter):
    change(adapter, lora_dropout=0.1)
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        PeftModel.from_pretrained(small_moe("mixtral"), adapter)
    with pytest.raises(
        ExpertLoraError, match="configuration: adapter_config.json has lora_dropout=0.1.*Set it to 0.0"
    ):
        check_adapter(adapter, small_moe("mixtral"))


def test_everything_that_is_wrong_is_said_at_once(adapter):
    def damage(tensors):
        tensors.pop(min(tensors))
        tensors[max(tensors)].fill_(float("nan"))

    change(adapter, damage, lora_dropout=0.1)
    diagnosis = diagnose(adapter, small_moe("mixtral", hidden_size=64))
    assert {check.name for check in diagnosis.problems} == {"configuration", "values", "keys", "shapes"}
    assert diagnosis.report is None


def single_experts(modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Factors of rank 2 as of transformers 4, in which every expert of Mixtral was a module."""
    tensors = {}
    for layer in range(3):
        for expert in range(4):
            for module in modules:
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{module}"
                a, b = (48, 32) if module == "w2" else (32, 48)
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = torch.ones(2, a), torch.ones(b, 2)
    return tensors


def test_files_of_single_experts(tmp_path):
    get_peft_model(small_moe("mixtral"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)

    def put(tensors, modules):
        tensors.clear()
        tensors.update(single_experts(modules))

    everything = ("w1", "w2", "w3")
    change(tmp_path, lambda tensors: put(tensors, everything), target_modules=everything, peft_version=None)
    diagnosis = check_adapter(tmp_path, small_moe("mixtral"))
    assert "layout: ok" in [f"{check.name}: {check.status}" for check in diagnosis.checks]
    assert [target.ranks[0] for target in diagnosis.report.targets if target.kind == "experts"] == [[4] * 4, [2] * 4]
    change(tmp_path, lambda tensors: put(tensors, ("w1", "w2")))
    with pytest.raises(ExpertLoraError, match="Gate and up must both be there"):
        check_adapter(tmp_path, small_moe("mixtral"))
    change(tmp_path, lambda tensors: put(tensors, everything), target_modules=["q_proj"])
    with pytest.raises(ExpertLoraError, match="keys: .* have no place in the model"):
        check_adapter(tmp_path, small_moe("mixtral"))


def test_files_that_are_no_adapter_are_refused(adapter, tmp_path):
    for source, message in (
        (tmp_path, "it has no adapter_config.json"),
        (tmp_path / "gone", "is no folder with an adapter"),
    ):
        with pytest.raises(ExpertLoraError, match=message):
            check_adapter(source, small_moe("mixtral"))
    save_esft(apply_esft(small_moe("mixtral"), ExpertSelection({0: [1]})), tmp_path / "esft")
    with pytest.raises(ExpertLoraError, match="It has experts of `save_esft`: `load_esft"):
        check_adapter(tmp_path / "esft", small_moe("mixtral"))
    with pytest.raises(ExpertLoraError, match="gone is no folder with a model"):
        check_adapter(adapter, tmp_path / "gone")
    weights = adapter / FILES[1]
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(ExpertLoraError, match="no complete safetensors file.*cut short"):
        check_adapter(adapter, small_moe("mixtral"))
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ExpertLoraError, match="adapter_model.bin, which can run code.*save_pretrained"):
        check_adapter(adapter, small_moe("mixtral"))
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ExpertLoraError, match="has no adapter_model.safetensors"):
        check_adapter(adapter, small_moe("mixtral"))
    change_config = json.loads((adapter / FILES[0]).read_text()) | {"peft_type": "IA3"}
    (adapter / FILES[0]).write_text(json.dumps(change_config))
    with pytest.raises(ExpertLoraError, match="is a IA3 adapter"):
        check_adapter(adapter, small_moe("mixtral"))
    (adapter / FILES[0]).write_text("{")
    with pytest.raises(ExpertLoraError, match="adapter_config.json is broken"):
        check_adapter(adapter, small_moe("mixtral"))


def test_embeddings_that_were_saved_have_their_place(tmp_path):
    model = small_moe("mixtral")
    model = with_adapter(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert not diagnose(tmp_path, small_moe("mixtral")).problems
    with pytest.raises(ExpertLoraError, match=r"embed_tokens.weight is \(96, 32\), in the model \(98, 32\)"):
        check_adapter(tmp_path, small_moe("mixtral", vocab_size=98))


def test_dense_models_with_ordinary_adapters_pass(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(dense_model("llama"), config).save_pretrained(tmp_path)
    diagnosis = check_adapter(tmp_path, dense_model("llama"))
    assert diagnosis.report is None
