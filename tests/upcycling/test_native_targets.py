# SPDX-License-Identifier: Apache-2.0
"""
Every native class that a dense family can become, beside transformers' own dense class: logits, names and bytes on disk,
generation; the fields that a careless conversion would lose; what is refused.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import assert_close
from huggingface_hub.errors import StrictDataclassError
from native_pairs import FINE, LONGROPE, MISREADINGS, PAIRS, PARTIAL, dense_model, recipe, render
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import collapse, plan_upcycle, upcycle, upcycle_model
from hf_moe.upcycling import methods
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.families import FAMILIES


by_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def ids() -> torch.Tensor:
    """Longer than the sliding windows, and than what long-rope was trained with."""
    return torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(2))


def load(folder: Path, **arguments) -> transformers.PreTrainedModel:
    """The model in a folder; nothing may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model


def assert_same_tensors(folder: Path, other: Path) -> None:
    one, two = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert sorted(one) == sorted(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


def assert_same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype, name
        assert torch.equal(tensor, other.state_dict()[name]), name


@by_pair
@torch.no_grad()
def test_native_class_computes_what_the_dense_one_does(pair, tmp_path):
    dense = dense_model(pair, tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", recipe(pair))
    assert report.exact
    moe = load(tmp_path / "moe")
    assert type(moe).__name__ == f"{pair.native}ForCausalLM"
    assert report.num_parameters == moe.num_parameters()
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    expected = dense(ids()).logits
    assert_close(moe(ids()).logits, expected)
    generated = moe.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, dense.generate(ids(), max_new_tokens=4, do_sample=False))

    in_memory = upcycle_model(dense, recipe(pair))
    assert_same_state(in_memory, moe)
    assert_close(in_memory(ids()).logits, expected)
    moe.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", tmp_path / "moe")


@by_pair
def test_programs_that_compute_something_else_are_named(pair, tmp_path):
    plan = plan_upcycle(dense_model(pair).config, recipe(pair))
    for program, reason in (("llama.cpp", pair.llamacpp), ("vLLM", pair.vllm)):
        found = plan.misread_by.get(program, [])
        if reason is not None:
            assert found == [what for what in reason.split("; ") if what in MISREADINGS]
        assert all(any(program in warning and what in warning for warning in plan.warnings) for what in found)


def test_the_card_names_programs_that_compute_something_else(tmp_path):
    dense_model(PAIRS["qwen2 window"]).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe(PAIRS["qwen2 window"]))
    card = " ".join((tmp_path / "moe" / "README.md").read_text().split())
    said = "divide the experts' weights by their sum and ignores the sliding window."
    assert f"llama.cpp loads this model too, but computes something else: it does not {said}" in card
    assert "vLLM loads this model too, but computes something else: it ignores the sliding window." in card


@by_pair
@torch.no_grad()
def test_in_bfloat16(pair, tmp_path):
    dense = dense_model(pair, torch.bfloat16, tie_word_embeddings=False)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe(pair, verify="none"))
    eager = {"attn_implementation": "eager"}  # which GraniteMoeSWA has alone
    moe = load(tmp_path / "moe", dtype="auto", **eager)
    expected = load(tmp_path / "dense", dtype="auto", **eager)(ids()).logits
    assert torch.equal(moe(ids()).logits, expected) == pair.exact_in_bfloat16
    assert_same_state(upcycle_model(dense, recipe(pair)), moe)
    moe.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", tmp_path / "moe")

    # Two experts of equal weight: a half is no rounded number.
    undecided = upcycle_model(dense, recipe(pair, router_init="zero"))
    undecided.set_attn_implementation("eager")
    assert torch.equal(undecided(ids()).logits, expected)


# Pair, field of the native configuration, and what it would be if the conversion did not see to it.
TRAPS = [
    ("llama", "rms_norm_eps", 1e-5),
    ("llama", "head_dim", None),
    ("llama", "rope_parameters", None),
    ("llama", "hidden_act", "gelu"),
    ("llama", "tie_word_embeddings", False),
    ("llama llama3", "rope_parameters", None),
    ("llama yarn", "rope_parameters", None),
    ("llama biased", "attention_bias", False),
    ("llama biased", "attention_multiplier", 1.0),
    ("llama shared", "shared_intermediate_size", 0),
    ("mistral", "sliding_window", None),
    ("qwen2 window", "layer_types", None),
    ("qwen2", "norm_topk_prob", False),
    ("qwen2", "qkv_bias", False),
    ("qwen2 shared", "rope_parameters", {"rope_type": "default", "rope_theta": 5000.0}),
    ("qwen2 shared", "attention_bias", False),
    ("qwen2 shared", "first_k_dense_replace", 1),
    ("qwen2 shared", "n_shared_experts", 1),
    ("qwen3", "norm_topk_prob", False),
    ("qwen3 all windows", "use_sliding_window", False),
    ("qwen3 yarn", "rope_parameters", None),
    ("qwen3 window", "layer_types", None),
    ("qwen3 window", "sliding_window", 1024),
    ("qwen3 window", "rope_parameters", None),
    ("qwen3 window", "norm_topk_prob", False),
    ("qwen3 window biased", "mlp_layer_types", None),
    ("qwen3 shared", "use_qk_norm", False),
    ("qwen3.5", "layer_types", None),
    ("qwen3.5", "head_dim", 8),
    ("phi3 window", "sliding_window", None),
    ("phi3 longrope", "rope_parameters", {**LONGROPE, "original_max_position_embeddings": 512}),
    ("phi3 longrope", "rope_parameters", None),
    ("phi3 longrope", "head_dim", None),
    ("phi3 partial", "rope_parameters", {**PARTIAL, "partial_rotary_factor": 1.0}),
    ("phi3 partial", "norm_topk_prob", False),
    ("phi3 partial", "routed_scaling_factor", 2.5),
    ("phi3 partial longrope", "rope_parameters", PARTIAL),
    ("olmo2", "norm_topk_prob", False),
    ("olmo2 biased", "attention_bias", False),
    ("olmo2", "rms_norm_eps", 1e-6),
    ("granite", "attention_multiplier", 1.0),
    ("granite", "embedding_multiplier", 1.0),
    ("granite", "residual_multiplier", 1.0),
    ("granite", "logits_scaling", 1.0),
    ("smollm3", "layer_rope_theta", None),
    ("smollm3", "attention_multiplier", 1.0),
    ("smollm3 window", "layer_types", None),
    ("smollm3 window", "sliding_window", 128),
    ("cohere2 shared", "layer_types", None),
    ("cohere2 shared", "rope_parameters", None),
    ("cohere2", "logit_scale", 1.0),
    ("cohere2 shared", "prefix_dense_sliding_window_pattern", 1),
    ("cohere2 shared", "shared_expert_combination_strategy", "average"),
    ("cohere2 shared", "num_shared_experts", 0),
    ("hunyuan", "rope_parameters", None),
    ("ernie4.5", "moe_layer_start_index", 0),
    ("ernie4.5", "moe_layer_end_index", -1),
    ("ernie4.5", "moe_num_shared_experts", 2),
]


@pytest.mark.parametrize(("name", "field", "careless"), TRAPS, ids=[f"{name}-{field}" for name, field, _ in TRAPS])
@torch.no_grad()
def test_without_the_field_it_would_be_another_model(name, field, careless):
    """So the tests above fail when the conversion loses the field."""
    dense = dense_model(PAIRS[name], tie_word_embeddings=field == "tie_word_embeddings")
    moe = upcycle_model(dense, recipe(PAIRS[name]))
    values = {**moe.config.to_dict(), field: careless}
    if careless is None:
        del values[field]
    try:
        other = type(moe)(type(moe.config)(**values)).eval()
        other.load_state_dict(moe.state_dict())
    except (RuntimeError, StrictDataclassError):  # tensors without a place; long-rope without a `head_dim`
        return
    expected = dense(ids()).logits
    assert_close(moe(ids()).logits, expected)
    error = (other(ids()).logits - expected).abs().max() / expected.abs().max()
    untied = field == "tie_word_embeddings" and other.lm_head.weight is not other.model.embed_tokens.weight
    assert error > 1e-3 or untied


# What to do to a tensor of the result, which would be another model without it.
TENSORS = [
    ("smollm3", "self_attn.sinks", torch.zeros_like),
    ("granite", "experts.gate_up_proj", lambda tensor: tensor.roll(tensor.shape[1] // 2, 1)),
    ("granite shared", "shared_mlp.input_linear.weight", lambda tensor: tensor.roll(len(tensor) // 2, 0)),
    ("phi3", "self_attn.k_proj.weight", lambda tensor: tensor.flip(0)),
    ("phi3 partial", "layers.0.mlp.up_proj.weight", lambda tensor: tensor.flip(0)),
    ("hunyuan", "mlp.shared_mlp.down_proj.weight", torch.ones_like),
    ("phi3 partial", "mlp.shared_experts.down_proj.weight", torch.ones_like),
    ("qwen3.5", "mlp.shared_expert.down_proj.weight", torch.ones_like),
    ("qwen3.5", "post_attention_layernorm.weight", lambda tensor: tensor + 1),
]


@pytest.mark.parametrize(("name", "ending", "change"), TENSORS, ids=[f"{name}-{end}" for name, end, _ in TENSORS])
@torch.no_grad()
def test_with_another_tensor_it_would_be_another_model(name, ending, change):
    dense = dense_model(PAIRS[name])
    moe = upcycle_model(dense, recipe(PAIRS[name]))
    for parameter_name, parameter in moe.named_parameters():
        if parameter_name.endswith(ending):
            parameter.copy_(change(parameter))
    expected = dense(ids()).logits
    assert (moe(ids()).logits - expected).abs().max() / expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["phi3", "olmo2", "granite", "smollm3", "qwen3.5", "cohere2", "hunyuan", "ernie4.5"])
@torch.no_grad()
def test_router_logits_have_the_std_asked_for(name):
    """So what is known of the router's input is right: which norm it comes from, and that Qwen3.5 adds 1 to the weights."""
    dense = dense_model(PAIRS[name], hidden_size=256, head_dim=16)
    moe = upcycle_model(dense, recipe(PAIRS[name], num_experts=64))
    for logits in moe(ids(), output_router_logits=True).router_logits:
        assert 0.8 < logits.std() < 1.25


def test_gate_of_a_shared_expert_is_not_zero():
    block = upcycle_model(dense_model(PAIRS["qwen3.5"]), recipe(PAIRS["qwen3.5"])).model.layers[0].mlp
    assert block.shared_expert.down_proj.weight.abs().max() == 0
    assert block.shared_expert_gate.weight.abs().min() > 0, "llama.cpp turns a gate of zero into NaN"


@pytest.mark.parametrize("verify", ["full", "layers"])
def test_proof_looks_at_a_shared_expert_beside_the_block(verify, tmp_path, monkeypatch):
    """GraniteMoeShared adds the shared expert's output to that of the block."""
    dense_model(PAIRS["llama shared"]).save_pretrained(tmp_path / "dense")
    options = recipe(PAIRS["llama shared"], verify=verify)
    assert upcycle(tmp_path / "dense", tmp_path / "moe", options).max_relative_error < 1e-6
    exact = methods.METHODS["residual"]

    def spoiled(dense, context):
        layer = exact.build(dense, context)
        return layer._replace(shared_expert=layer.shared_expert.map(lambda name, tensor: tensor * 1.001))

    monkeypatch.setitem(methods.METHODS, "residual", dataclasses.replace(exact, build=spoiled))
    with pytest.raises(UpcycleError, match="does not compute what the dense model computes"):
        upcycle(tmp_path / "dense", tmp_path / "spoiled", options)


# What the number of experts is called, where that is not `num_experts` alone.
EXPERT_KEYS = {
    "Mixtral": ["num_local_experts", "num_experts"],
    "Qwen3Moe": ["num_local_experts", "num_experts"],
    "Mellum": ["num_local_experts", "num_experts"],
    "GraniteMoe": ["num_local_experts"],
    "GraniteMoeShared": ["num_local_experts"],
    "GraniteMoeSWA": ["num_local_experts"],
    "Glm4Moe": ["n_routed_experts", "num_local_experts"],
    "Ernie4_5_Moe": ["moe_num_experts", "num_experts"],
}


@by_pair
def test_other_readers_find_their_keys_and_transformers_reads_the_same(pair, tmp_path):
    dense_model(pair, torch.bfloat16).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe(pair, verify="none"))
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    planned = plan_upcycle(AutoConfig.from_pretrained(tmp_path / "dense"), recipe(pair)).config
    planned.architectures = [f"{pair.native}ForCausalLM"]
    planned.save_pretrained(tmp_path / "plain")
    with_keys, without = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("moe", "plain"))
    assert {**with_keys, "_name_or_path": ""} == {**without, "_name_or_path": ""}

    assert written["torch_dtype"] == "bfloat16"
    rope = planned.rope_parameters
    if "rope_type" in rope:
        assert written["rope_theta"] == rope["rope_theta"]
        if rope["rope_type"] != "default" and pair.native != "Cohere2Moe":  # which has a field of that name, unused
            assert written["rope_scaling"]["rope_type"] == rope["rope_type"]
            assert written["rope_scaling"].get("short_factor") == rope.get("short_factor")
    assert [written[name] for name in EXPERT_KEYS.get(pair.native, ["num_experts"])] in ([4], [4, 4])


REFUSALS = [
    ("llama", {"mlp_bias": True}, {}, "GraniteMoe: it has no place for mlp_bias=True"),
    ("llama", {}, {"norm_topk_prob": False}, "Mixtral: .*norm_topk_prob=False"),
    ("llama", {}, {"num_experts": [4, 4, 6]}, "GraniteMoe: all its layers have one number of experts"),
    ("mistral", {}, {"method": "residual"}, "GraniteMoeShared: it has no place for sliding_window=8"),
    ("qwen2 window", {}, {"method": "residual"}, "sigmoid gate.*Glm4Moe: it has no sliding window .sliding_window=8"),
    ("qwen2 shared", {}, {"layers": ":2"}, "Glm4Moe: it cannot keep just these layers dense .`layers`=':2'"),
    ("qwen2 shared", {}, {"norm_topk_prob": False}, "Glm4Moe: it always divides"),
    ("qwen3 shared", {"attention_bias": True}, {}, "Glm4Moe: its output projection has no bias .attention_bias=True"),
    ("qwen3 window", {}, {"method": "residual", "layers": None}, "Mellum: it has no shared expert"),
    ("phi3 partial", {"sliding_window": 511}, {}, "partial_rotary_factor=0.5.*Glm4Moe: .*sliding_window=511"),
    ("phi3", {"resid_pdrop": 0.1}, {}, "Mixtral: it has no place for resid_pdrop=0.1"),
    ("olmo2", {}, {"method": "residual"}, "FlexOlmo: it has no shared expert"),
    ("olmo2", {}, {"layers": [0]}, "FlexOlmo: it cannot keep just these layers dense .`layers`=.0."),
    ("granite", {"mlp_bias": True}, {}, "GraniteMoe: it has no place for mlp_bias=True"),
    ("smollm3", {"mlp_bias": True}, {}, "GraniteMoeSWA: it has no place for mlp_bias=True"),
    ("hunyuan", {}, FINE, "HunYuanMoEV1: its shared expert is as large as a routed one, 24, and not 48"),
    ("ernie4.5", {"use_bias": True}, {}, "Ernie4_5_Moe: its experts have no biases"),
    ("ernie4.5", {}, {"layers": [0, 2]}, "Ernie4_5_Moe: it cannot keep just these layers dense"),
]


@pytest.mark.parametrize(("name", "values", "options", "message"), REFUSALS)
def test_what_a_class_cannot_hold_is_refused_by_name(name, values, options, message):
    config = dense_model(PAIRS[name], **values).config
    with pytest.raises(UpcycleError, match=message):
        plan_upcycle(config, recipe(PAIRS[name], **options))


def test_family_without_a_class_of_ours():
    config = dense_model(PAIRS["cohere2"]).config
    with pytest.raises(UpcycleError, match="no class of its own for model_type 'cohere2'.*target='native'"):
        plan_upcycle(config, recipe(PAIRS["cohere2"], target="hf_moe"))
    with pytest.raises(UpcycleError, match="norm_topk_prob=False.*Change what is named"):
        plan_upcycle(config, recipe(PAIRS["cohere2"], target="auto", norm_topk_prob=False))
    config.architectures = ["Cohere2ForSequenceClassification"]
    with pytest.raises(UpcycleError, match="Cohere2ForSequenceClassification.*Cohere2ForCausalLM"):
        plan_upcycle(config, recipe(PAIRS["cohere2"]))


def test_native_class_without_the_head():
    config = dense_model(PAIRS["llama biased"]).config
    config.architectures = ["LlamaForSequenceClassification"]
    with pytest.raises(UpcycleError, match="GraniteMoe: there is no class GraniteMoeForSequenceClassification"):
        plan_upcycle(config, recipe(PAIRS["llama biased"]))
    assert plan_upcycle(config, recipe(PAIRS["llama biased"], target="auto")).model_type == "moe_llama"


@pytest.mark.parametrize(
    ("name", "model_type", "drawback"),
    [
        ("smollm3", "granitemoe_swa", "cannot use SDPA"),
        ("phi3 longrope", "mixtral", "past original_max_position_embeddings"),
        ("phi3 partial longrope", "glm4_moe", "past original_max_position_embeddings"),
    ],
)
def test_class_with_a_drawback_is_the_second_choice(name, model_type, drawback, monkeypatch):
    config, warnings = dense_model(PAIRS[name]).config, []
    monkeypatch.setattr("hf_moe.upcycling.targets.logger", SimpleNamespace(warning_once=warnings.append))
    family = FAMILIES[config.model_type]
    monkeypatch.setitem(FAMILIES, config.model_type, dataclasses.replace(family, target=None))
    assert plan_upcycle(config, recipe(PAIRS[name], target="auto")).model_type == model_type
    assert drawback in warnings.pop()
    # Any class of ours will do here.
    monkeypatch.setitem(FAMILIES, config.model_type, dataclasses.replace(family, target=FAMILIES["llama"].target))
    assert plan_upcycle(config, recipe(PAIRS[name], target="auto")).model_type == "moe_llama"
    assert not warnings
    assert plan_upcycle(config, recipe(PAIRS[name])).model_type == model_type
    assert drawback in warnings.pop()


@torch.no_grad()
def test_backbone_alone(tmp_path):
    """Qwen3.5 calls its backbones otherwise than all others."""
    dense_model(PAIRS["qwen3.5"]).model.save_pretrained(tmp_path / "dense")
    assert upcycle(tmp_path / "dense", tmp_path / "moe", recipe(PAIRS["qwen3.5"])).exact
    dense, moe = (transformers.AutoModel.from_pretrained(tmp_path / name) for name in ("dense", "moe"))
    assert type(moe).__name__ == "Qwen3_5MoeTextModel"
    assert_close(moe(ids()).last_hidden_state, dense(ids()).last_hidden_state)


@pytest.mark.parametrize("name", ["phi3 partial", "granite shared", "ernie4.5"])
def test_plan_is_what_comes_true(name):
    dense = dense_model(PAIRS[name])
    plan, moe = plan_upcycle(dense.config, recipe(PAIRS[name])), upcycle_model(dense, recipe(PAIRS[name]))
    assert (plan.architecture, plan.num_parameters) == (type(moe).__name__, moe.num_parameters())
    experts = [parameter for parameter_name, parameter in moe.named_parameters() if "experts." in parameter_name]
    routed = sum(parameter.numel() for parameter in experts if parameter.dim() == 3)
    assert plan.num_active_parameters == moe.num_parameters() - routed // 2


@by_pair
def test_collapsing_gives_the_dense_model_back(pair, tmp_path):
    dense_model(pair, torch.bfloat16).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe(pair, verify="none"), progress=False)
    assert collapse(tmp_path / "moe", tmp_path / "back", progress=False).exact
    assert_same_tensors(tmp_path / "dense", tmp_path / "back")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "back")]
    assert configs[0] == configs[1]


def test_table_has_a_line_per_pair_and_condition():
    lines = render().splitlines()[2:]
    assert len(lines) == len({(pair.dense, pair.native, pair.when) for pair in PAIRS.values()})
    assert {line.count("|") for line in lines} == {7}
