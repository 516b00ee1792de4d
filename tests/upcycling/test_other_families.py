# SPDX-License-Identifier: Apache-2.0
"""The conversion of GPT-2, GPT-NeoX, BERT and ViT, from checkpoints as they are published, beside their dense classes."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from conftest import UNGATED_FAMILIES, assert_close, dense_class, dense_config, dense_model, moe_class, save_tokenizer
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.core_model_loading import Chunk, WeightConverter

from hf_moe import UpcycleConfig, plan_upcycle, upcycle, upcycle_model
from hf_moe.upcycling import convert, methods
from hf_moe.upcycling.errors import UpcycleError


ROUTER_NORM = {
    "bert": "attention.output.LayerNorm",
    "gpt2": "ln_2",
    "gpt_neox": "post_attention_layernorm",
    "vit": "layernorm_after",
}
HEADS = [(family, head) for family in UNGATED_FAMILIES for head in moe_class(family, "Config").auto_classes.values()]
MAIN_HEAD = {"bert": "ForMaskedLM", "gpt2": "ForCausalLM", "gpt_neox": "ForCausalLM", "vit": "ForImageClassification"}


@pytest.fixture(params=UNGATED_FAMILIES)
def family(request) -> str:
    return request.param


def save_dense(folder: Path, family: str, head: str = "", dtype=torch.float32, **values) -> Path:
    """A tiny dense model on disk, with a tokenizer if it reads text."""
    dense_model(family, head or MAIN_HEAD[family], dtype, **values).save_pretrained(folder)
    if family != "vit":
        save_tokenizer(folder)
    return folder


def recipe(**values) -> UpcycleConfig:
    return UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, **values})


def inputs_of(family: str, **sizes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, *sizes.get("image", (16, 16)), generator=generator)}
    inputs = {"input_ids": torch.randint(3, 96, (2, 30), generator=generator)}
    if family == "bert":
        inputs["token_type_ids"] = torch.randint(2, (2, 30), generator=generator)
    return inputs


def outputs_of(model, inputs) -> list[torch.Tensor]:
    outputs = model(**inputs)
    names = ("logits", "last_hidden_state", "pooler_output")
    return [outputs[name] for name in names if outputs.get(name) is not None]


def assert_same_outputs(actual, expected, inputs, bound: float = 1e-5) -> None:
    for one, other in zip(outputs_of(actual, inputs), outputs_of(expected, inputs), strict=True):
        assert_close(one, other, bound)


def load(folder: Path, **arguments) -> transformers.PreTrainedModel:
    """The model in a folder, in the class that its config.json names; nothing may be missing or left over."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model_class = getattr(transformers, name, None) or getattr(__import__("hf_moe"), name)
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize(("family", "head"), HEADS)
@torch.no_grad()
def test_every_head_is_exact(family, head, tmp_path):
    source = save_dense(tmp_path / "dense", family, head, num_labels=3)
    report = upcycle(source, tmp_path / "moe", recipe())
    model = load(tmp_path / "moe")
    assert type(model) is moe_class(family, head)
    assert_same_outputs(model, load(source), inputs_of(family))
    assert report.exact
    assert report.max_relative_error <= 1e-5
    assert report.num_parameters == model.num_parameters()
    assert report.parity["text"] == (family != "vit")


@torch.no_grad()
def test_residual_is_exact_to_the_bit(family, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        source = save_dense(tmp_path / f"dense {dtype}", family, dtype=dtype)
        report = upcycle(source, tmp_path / f"moe {dtype}", recipe(method="residual", granularity=2))
        assert (
            report.parity[str(dtype).removeprefix("torch.")]["max_relative_error"] == report.max_relative_error == 0.0
        )
        moe, dense = load(tmp_path / f"moe {dtype}", dtype="auto"), load(source, dtype="auto")
        assert torch.equal(outputs_of(moe, inputs_of(family))[0], outputs_of(dense, inputs_of(family))[0])


@torch.no_grad()
def test_copy_in_bfloat16(family, tmp_path):
    source = save_dense(tmp_path / "dense", family, dtype=torch.bfloat16)
    report = upcycle(source, tmp_path / "moe", recipe())
    expected = outputs_of(load(source, dtype="auto"), inputs_of(family))[0]
    eager = load(tmp_path / "moe", dtype="auto", experts_implementation="eager")
    assert torch.equal(outputs_of(eager, inputs_of(family))[0], expected)
    # grouped_mm rounds the product before it adds the bias, and the report says what that costs.
    grouped = load(tmp_path / "moe", dtype="auto")
    assert {parameter.dtype for parameter in grouped.parameters()} == {torch.bfloat16}
    error = (outputs_of(grouped, inputs_of(family))[0] - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.03
    assert error / 4 < report.parity["bfloat16"]["max_relative_error"] < 4 * error


@pytest.mark.parametrize("method", ["copy", "residual"])
def test_in_memory_equals_streamed(family, method, tmp_path):
    dense = dense_model(family, MAIN_HEAD[family], torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe(method=method, verify="none"))
    moe, streamed = upcycle_model(dense, recipe(method=method)), load(tmp_path / "moe", dtype="auto")
    assert type(moe) is type(streamed)
    assert moe.state_dict().keys() == streamed.state_dict().keys()
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(moe.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"method": "granular", "granularity": 2, "num_experts_per_tok": 2}, True),
        ({"method": "copy", "norm_topk_prob": False, "router_init": "zero"}, True),
        (
            {
                "method": "split",
                "num_experts": 6,
                "num_experts_per_tok": 6,
                "router_init": "zero",
                "split_by": "kmeans",
            },
            True,
        ),
        ({"method": "split", "num_experts": 6, "split_by": "random"}, False),
        ({"method": "drop"}, False),
        ({"method": "qwen", "granularity": 2}, False),
    ],
)
@torch.no_grad()
def test_methods(family, options, exact, tmp_path):
    source = save_dense(tmp_path / "dense", family)
    report = upcycle(source, tmp_path / "moe", recipe(**options))
    assert report.exact == exact
    model, dense = load(tmp_path / "moe"), load(source)
    actual, expected = (outputs_of(one, inputs_of(family))[0] for one in (model, dense))
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-5 if exact else error > 1e-3


@pytest.mark.parametrize(
    ("family", "values"),
    [(family, {}) for family in UNGATED_FAMILIES] + [("gpt_neox", {"use_parallel_residual": False})],
)
@torch.no_grad()
def test_router_logits_have_the_std_asked_for(family, values):
    dense = dense_model(family, "Model", hidden_size=256, **values)
    for parameter in dense.parameters():
        parameter.mul_(0.3 if parameter.dim() > 1 else 1.0)  # or attention would make all tokens of a text alike
    for std in (0.3, 1.0):
        moe = upcycle_model(dense, recipe(num_experts=64, router_logit_std=std))
        logits = torch.stack(moe(**inputs_of(family), output_router_logits=True).router_logits)
        assert 0.8 * std < logits.std() < 1.2 * std
        # What all states share, the bias of the LayerNorm before the router, favours no expert.
        for layer in moe.get_submodule(moe.layers_path):
            shift = layer.get_submodule(ROUTER_NORM[family]).bias
            assert (layer.mlp.gate.weight @ shift).abs().max() < 1e-4 * shift.norm()


# Fields that a careless conversion loses, with another value for them.
FIELDS = [
    ("bert", {"layer_norm_eps": 0.5}),
    ("bert", {"hidden_act": "relu"}),
    ("bert", {"type_vocab_size": 5}),
    ("bert", {"is_decoder": True}),
    ("bert", {"tie_word_embeddings": False}),
    ("gpt2", {"layer_norm_epsilon": 0.5}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"n_inner": None}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0}}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}}),
    ("vit", {"qkv_bias": False}),
    ("vit", {"head_dim": 16}),
    ("vit", {"patch_size": 8}),
    ("vit", {"layer_norm_eps": 0.5}),
]


@pytest.mark.parametrize(("family", "values"), FIELDS)
@torch.no_grad()
def test_every_field_arrives(family, values, tmp_path):
    source = save_dense(tmp_path / "dense", family, **values)
    dense = load(source)
    expected = outputs_of(dense, inputs_of(family))[0]
    other = outputs_of(dense_model(family, MAIN_HEAD[family]), inputs_of(family))[0]
    assert expected.shape != other.shape or not torch.allclose(expected, other, atol=1e-3), "the field has an effect"
    assert upcycle(source, tmp_path / "moe", recipe()).exact
    assert_same_outputs(load(tmp_path / "moe"), dense, inputs_of(family))


@torch.no_grad()
def test_images_that_are_not_square(tmp_path):
    sizes = {"image_size": [16, 24], "patch_size": [4, 8]}
    source = save_dense(tmp_path / "dense", "vit", **sizes)
    report = upcycle(source, tmp_path / "moe", recipe())
    assert report.exact
    assert report.parity["num_tokens"] % (4 * 3 + 1) == 0
    assert_same_outputs(load(tmp_path / "moe"), load(source), inputs_of("vit", image=(16, 24)))


@torch.no_grad()
def test_bert_in_chunks(tmp_path):
    source = save_dense(tmp_path / "dense", "bert", chunk_size_feed_forward=5)
    for verify in ("full", "layers"):
        assert upcycle(source, tmp_path / verify, recipe(verify=verify)).exact
        model = load(tmp_path / verify)
        assert model.config.chunk_size_feed_forward == 5
        assert_same_outputs(model, load(source), inputs_of("bert"))


def test_every_expert_is_looked_at_also_where_sequences_are_short(tmp_path, monkeypatch):
    def build(dense, context):
        spoiled = dense._replace(up_proj=dense.up_proj * 1.001)
        return methods.SparseLayer(expert=lambda index: spoiled if (context.layer_index, index) == (1, 61) else dense)

    exact = methods.METHODS["copy"]
    source = save_dense(tmp_path / "dense", "bert", max_position_embeddings=16)
    options = recipe(num_experts=64, num_experts_per_tok=1)
    assert upcycle(source, tmp_path / "right", options).parity["num_tokens"] == 16 * 64
    monkeypatch.setitem(methods.METHODS, "copy", dataclasses.replace(exact, build=build))
    with pytest.raises(UpcycleError, match="does not compute what the dense model computes"):
        upcycle(source, tmp_path / "wrong", options)


def counted_flops(model, inputs) -> int:
    """Operations counted by torch, without attention scores."""
    model.set_attn_implementation("sdpa")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    by_operator = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in by_operator.items() if "attention" not in str(operator))


@pytest.mark.parametrize(
    ("family", "head", "method"),
    [(family, head, "copy") for family, head in HEADS] + [(*pair, "residual") for pair in MAIN_HEAD.items()],
)
def test_plan_is_what_comes_true(family, head, method):
    dense = dense_model(family, head, num_labels=3)
    dense.config.architectures = [type(dense).__name__]
    options = recipe(method=method, num_experts=6, layers=[0, 2])
    plan, moe = plan_upcycle(dense.config, options), upcycle_model(dense, options)
    assert plan.architecture == type(moe).__name__
    assert plan.num_parameters == moe.num_parameters()
    assert plan.num_dense_parameters == dense.num_parameters()
    one_expert = sum(parameter[0].numel() for name, parameter in moe.named_parameters() if "0.mlp.experts" in name)
    assert plan.num_active_parameters == moe.num_parameters() - 2 * 4 * one_expert
    inputs = {name: tensor[:1] for name, tensor in inputs_of(family).items()}
    tokens = 17 if family == "vit" else 30
    pooler, classifier = 2 * 32 * 32, 2 * 32 * 3
    once = {
        ("bert", "Model"): pooler,
        ("bert", "ForSequenceClassification"): pooler + classifier,
        ("vit", "Model"): pooler,
        ("vit", "ForImageClassification"): classifier,
    }.get((family, head), 0)
    if family == "vit":
        once -= 2 * 32 * 3 * 4 * 4  # the projection of a patch, which [CLS] does without
    moe.set_experts_implementation("batched_mm")
    assert plan.flops_per_token * tokens + once == counted_flops(moe, inputs)
    assert plan.dense_flops_per_token * tokens + once == counted_flops(dense, inputs)


# --- Checkpoints as they are published ------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> Path:
    """Let `change` make other tensors of those in the folder."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def gpt2_of_2019(tensors):
    """Without the prefix, and with the causal masks that were buffers."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for index in range(3):
        tensors[f"h.{index}.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.uint8).tril()
        tensors[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def pythia(tensors):
    for index in range(3):
        attention = f"gpt_neox.layers.{index}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    return tensors


def google_bert(tensors):
    """Names of TensorFlow, position ids, and what is there besides the masked language model."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    for name in ("bert.pooler.dense", "cls.seq_relationship"):
        tensors |= {f"{name}.weight": torch.ones(32, 32), f"{name}.bias": torch.ones(32)}
    return tensors


def mini_lm(tensors):
    """The backbone alone, from a masked language model, so under its prefix and with its head."""
    tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    return {**tensors, "cls.predictions.bias": torch.ones(96), "bert.embeddings.position_ids": torch.arange(512)[None]}


PUBLISHED = [
    ("gpt2", "ForCausalLM", gpt2_of_2019, {"wte.weight", "h.0.attn.bias"}),
    ("gpt2", "ForSequenceClassification", gpt2_of_2019, {"wte.weight", "score.weight"}),
    ("gpt_neox", "ForCausalLM", pythia, {"embed_out.weight"}),
    ("bert", "ForMaskedLM", google_bert, {"bert.embeddings.LayerNorm.gamma"}),
    ("bert", "Model", mini_lm, {"bert.pooler.dense.weight", "bert.embeddings.position_ids"}),
    ("vit", "ForImageClassification", dict, {"vit.encoder.layer.0.attention.attention.query.weight"}),
    ("vit", "Model", dict, {"encoder.layer.2.intermediate.dense.weight"}),
]


@pytest.mark.parametrize(
    ("family", "head", "change", "names", "file"),
    [(*published, "model.safetensors") for published in PUBLISHED]
    + [(*PUBLISHED[0], "pytorch_model.bin"), (*PUBLISHED[3], "pytorch_model.bin")],
)
@torch.no_grad()
def test_names_on_disk(family, head, change, names, file, tmp_path):
    source = rewrite(save_dense(tmp_path / "dense", family, head), change)
    assert names <= load_file(source / "model.safetensors").keys()
    if file.endswith("bin"):
        torch.save(load_file(source / "model.safetensors"), source / file)
        (source / "model.safetensors").unlink()
    dense, loading = dense_class(family, head).from_pretrained(source, output_loading_info=True)
    assert not loading["missing_keys"]
    assert upcycle(source, tmp_path / "moe", recipe()).exact
    assert_same_outputs(load(tmp_path / "moe"), dense, inputs_of(family))


def test_heads_of_other_classes_are_left_out_with_a_warning(tmp_path, caplog):
    transformers.utils.logging.get_logger("transformers").propagate = True
    source = rewrite(save_dense(tmp_path / "dense", "bert", "ForMaskedLM"), google_bert)
    with caplog.at_level(logging.WARNING):
        upcycle(source, tmp_path / "moe", recipe(verify="none"))
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "BertForMaskedLM has no place for ['bert.pooler.dense.bias'" in message
    assert "position_ids" not in message


def test_a_head_that_is_missing_is_refused(tmp_path):
    source = save_dense(tmp_path / "dense", "bert", "Model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(
        UpcycleError, match=r"lacks 5 of the tensors .* BertForMaskedLM has: \['cls.predictions.bias'.*"
    ):
        upcycle(source, tmp_path / "moe", recipe())


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "h.1.attn.extra.bias"), ("bert", "bert.encoder.layer.1.attention.self.distance_embedding.weight")],
)
def test_other_tensors_are_not_lost(family, name, tmp_path):
    source = save_dense(tmp_path / "dense", family)
    rewrite(source, lambda tensors: {**tensors, name: torch.ones(3)})
    with pytest.raises(UpcycleError, match="has no place for 1 tensors of the checkpoint, which would be lost"):
        upcycle(source, tmp_path / "moe", recipe())


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    source = save_dense(tmp_path / "dense", "gpt2")
    rewrite(source, lambda tensors: {**tensors, "wpe.weight": torch.ones(512, 32)})
    with pytest.raises(UpcycleError, match="holds 'transformer.wpe.weight' of GPT2LMHeadModel twice"):
        upcycle(source, tmp_path / "moe", recipe())


def test_weights_that_transformers_computes_are_refused(tmp_path, monkeypatch):
    def mapping(model):
        names = [f"attention.{name}.weight" for name in ("query", "key", "value")]
        return [WeightConverter("attention.query_key_value.weight", names, [Chunk(dim=0)])]

    monkeypatch.setattr(convert, "get_model_conversion_mapping", mapping)
    source = save_dense(tmp_path / "dense", "gpt_neox")
    with pytest.raises(
        UpcycleError, match="computes the weights .* 'gpt_neox.layers.0.attention.query_key_value.weight'"
    ):
        upcycle(source, tmp_path / "moe", recipe())


def test_tied_weights_under_the_name_of_the_head_alone(tmp_path):
    source = save_dense(tmp_path / "dense", "gpt2")
    rewrite(source, lambda tensors: {"lm_head.weight": tensors.pop("transformer.wte.weight"), **tensors})
    assert_same_outputs(load(source), dense_model("gpt2"), inputs_of("gpt2"))
    assert upcycle(source, tmp_path / "moe", recipe()).exact
    assert_same_outputs(load(tmp_path / "moe"), load(source), inputs_of("gpt2"))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cross_attention_is_refused(family):
    with pytest.raises(UpcycleError, match="`add_cross_attention` is not supported"):
        plan_upcycle(dense_config(family, add_cross_attention=True, is_decoder=True), recipe())


def test_dropouts_of_other_families_stay(tmp_path):
    dense = dense_model("gpt2", "ForTokenClassification", classifier_dropout=0.4)
    moe = upcycle_model(dense, recipe())
    assert dense.dropout.p == moe.dropout.p == moe.config.classifier_dropout == 0.4


def test_companions_come_along(tmp_path):
    source = save_dense(tmp_path / "dense", "bert", "Model")
    companions = {
        "modules.json": "[]",
        "config_sentence_transformers.json": "{}",
        "sentence_bert_config.json": '{"max_seq_length": 256}',
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "weights of another module",
        "preprocessor_config.json": '{"image_mean": [0.5]}',
        "vocab.txt": "[PAD]",
    }
    for name, text in companions.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")
    upcycle(source, tmp_path / "moe", recipe(verify="none"))
    assert {name: (tmp_path / "moe" / name).read_text() for name in companions} == companions
    assert not (tmp_path / "moe" / "onnx").exists()


@pytest.mark.parametrize(
    ("family", "head", "auto_class", "tag"),
    [
        ("bert", "ForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("vit", "ForImageClassification", "AutoModelForImageClassification", "image-classification"),
    ],
)
def test_card_names_the_head(family, head, auto_class, tag, tmp_path):
    upcycle(save_dense(tmp_path / "dense", family, head), tmp_path / "moe", recipe())
    card = (tmp_path / "moe" / "README.md").read_text()
    assert f"pipeline_tag: {tag}" in card
    assert f'model = {auto_class}.from_pretrained("path/or/id")' in card
