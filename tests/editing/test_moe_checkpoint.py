# SPDX-License-Identifier: Apache-2.0
"""Reading mixtures of experts: their layers, experts and routers in every layout, and what is refused."""

import json

import pytest
import torch
import transformers
from conftest import TINY, dense_model, randomize, save_tokenizer
from small_moes import NATIVE, change_json, change_tensors, load, save_moe, small_moe, sparse_block, tensors

from hf_moe import expand_experts, prune_experts
from hf_moe.editing.measure import Subject, measure
from hf_moe.editing.moe_checkpoint import MoeCheckpoint
from hf_moe.editing.sparse_block import find_blocks
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.layouts import FusedLayout, PerExpertLayout
from hf_moe.upcycling.sample import sample_of
from hf_moe.upcycling.streaming import Side, output_of, streamed_model


KINDS = [*NATIVE, "moe_llama", "moe_qwen3"]


@pytest.mark.parametrize(
    ("kind", "original"), [*((kind, True) for kind in KINDS), ("mixtral", False), ("olmoe", False)]
)
def test_experts_and_rows_are_those_of_the_model(kind, original, tmp_path):
    moe = MoeCheckpoint(save_moe(tmp_path / "moe", kind, save_original_format=original))
    model = load(tmp_path / "moe")
    sparse = {"qwen3_moe": [0, 2], "deepseek_v3": [1, 2]}.get(kind, [0, 1, 2])
    assert list(moe.blocks) == sparse
    fused = not original or kind.startswith(("moe_", "granite"))
    assert isinstance(moe.layout, FusedLayout if fused else PerExpertLayout)
    for index, block in moe.blocks.items():
        mlp = sparse_block(model.model.layers[index])
        for expert_index in range(4):
            expert = moe.read_expert(block, expert_index)
            assert torch.equal(torch.cat(expert[:2]), mlp.experts.gate_up_proj[expert_index])
            assert torch.equal(expert.down_proj, mlp.experts.down_proj[expert_index])
        rows = moe.read_rows(block)
        gate = mlp.router if kind.startswith("granite") else mlp.gate
        assert torch.equal(rows.pop("weight"), gate.weight)
        assert list(rows) == (["e_score_correction_bias"] if kind == "deepseek_v3" else [])
    assert moe.top_k == 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_streamed_model_is_the_model(kind, tmp_path):
    moe = MoeCheckpoint(save_moe(tmp_path / "moe", kind))
    sample = sample_of(moe.checkpoint, 64)
    streamed = streamed_model(Side(moe.model_class, moe.checkpoint), moe.config, torch.float32, moe.target)
    expected = load(tmp_path / "moe")(**sample.inputs).logits
    assert torch.allclose(output_of(streamed(**sample.inputs)), expected, atol=1e-5)
    subject = Subject(moe.model_class, moe.checkpoint, moe.config, moe.target)
    measured = measure(subject, subject, sample, progress=False)
    assert measured["float32"] == {"max_relative_error": 0.0, "top1_agreement": 1.0, "kl_divergence": 0.0}


def test_a_bin_checkpoint(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama")
    model = load(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    moe = MoeCheckpoint(source)
    assert torch.equal(moe.read_expert(moe.blocks[1], 3).down_proj, model.model.layers[1].mlp.experts.down_proj[3])


def save(folder, model_class, config):
    model = model_class(config)
    randomize(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def rename(found: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(found):
        found[name.replace(old, new)] = found.pop(name)


def bad_source(kind: str, folder):
    match kind:
        case "dense":
            dense_model("llama").save_pretrained(folder)
        case "gpt-oss":
            config = transformers.GptOssConfig(
                **TINY, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 3
            )
            save(folder, transformers.GptOssForCausalLM, config)
        case "groups":
            save_moe(folder, "deepseek_v3", n_group=2, topk_group=1)
        case _:
            save_moe(folder, "mixtral")
    match kind:
        case "missing":
            change_tensors(folder, lambda found: found.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
        case "extra":
            change_tensors(folder, lambda found: found.update({"model.layers.1.mlp.more": torch.zeros(2)}))
        case "shape":
            change_json(folder / "config.json", num_local_experts=3)
        case "wide":
            change_json(folder / "config.json", intermediate_size=24)
        case "nan":
            name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
            change_tensors(folder, lambda found: found[name].fill_(float("nan")))
        case "two types":
            name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
            change_tensors(folder, lambda found: found.update({name: found[name].half()}))
        case "quantized":
            change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        case "no class":
            change_json(folder / "config.json", architectures=["MixtralForPoetry"])
        case "names" | "layout":
            old, new = ("w1", "v1") if kind == "names" else ("w2", "v2")
            change_tensors(folder, lambda found: rename(found, old, new))
        case "provenance":
            (folder / "hf_moe.json").write_text("[")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dense", "LlamaForCausalLM is no mixture of experts.*`upcycle` makes one"),
        ("gpt-oss", "computes its experts \\(GptOssExperts\\) in a way that hf_moe cannot edit"),
        ("groups", "chooses among n_group=2 groups"),
        ("missing", "lacks 1 of the tensors.*experts.2.w3"),
        ("extra", "no place for 1 tensors.*model.layers.1.mlp.more"),
        ("shape", "has shape|has no place for"),
        ("wide", "has shape .* but config.json asks for"),
        ("nan", "experts.2.w3.weight' holds NaN"),
        ("two types", "experts in model.layers.1.mlp.experts are not of one data type"),
        ("quantized", "quantized \\(quantization_config\\)"),
        ("no class", "architectures=\\['MixtralForPoetry'\\] names no class of modeling_mixtral"),
        ("names", "lacks 12 of the tensors"),
        ("layout", "keeps its experts as .*experts.N.v2.weight.*hf_moe edits experts that are fused"),
        ("provenance", "hf_moe.json cannot be read"),
    ],
)
def test_bad_sources_are_refused(kind, message, tmp_path):
    source = bad_source(kind, tmp_path / "moe")
    with pytest.raises(UpcycleError, match=message):
        expand_experts(source, tmp_path / "more", progress=False)
    assert not (tmp_path / "more").exists()


def test_a_router_with_more_than_rows_is_refused():
    model = small_moe("mixtral")
    model.model.layers[1].mlp.gate.register_buffer("scale", torch.ones(1))
    with pytest.raises(UpcycleError, match="router of MixtralForCausalLM .*'model.layers.1.mlp.gate.scale' has shape"):
        find_blocks(model)


def test_rows_need_not_come_first(tmp_path):
    values = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1}
    config = transformers.Ernie4_5_MoeConfig(**TINY, **values, moe_num_shared_experts=0)
    save(tmp_path / "moe", transformers.Ernie4_5_MoeForCausalLM, config)
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    change_tensors(tmp_path / "moe", lambda found: found[name].copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]])))
    prune_experts(tmp_path / "moe", tmp_path / "less", drop=[1], progress=False)
    assert tensors(tmp_path / "less")[name].tolist() == [[1.0, 3.0, 4.0]]
    assert load(tmp_path / "less").config.moe_num_experts == 3


def test_layers_that_differ_need_our_class(tmp_path):
    moe = MoeCheckpoint(save_moe(tmp_path / "moe", "mixtral"))
    with pytest.raises(UpcycleError, match="All layers of MixtralForCausalLM have one number.*\\[3, 4\\]"):
        moe.with_experts({0: 4, 1: 3, 2: 4}, 2)
    with pytest.raises(
        UpcycleError, match="A token takes 2 experts \\(num_experts_per_tok\\), but only 1 would be left"
    ):
        moe.with_experts(dict.fromkeys(range(3), 1), 2)
    own = MoeCheckpoint(save_moe(tmp_path / "own", "moe_llama"))
    assert own.with_experts({0: 4, 1: 3, 2: 4}, 2).num_experts_per_layer == [4, 3, 4]
    assert own.with_experts({0: 3, 1: 3, 2: 3}, 2).num_experts_per_layer is None


def test_a_hub_source_brings_its_provenance(tmp_path, monkeypatch):
    snapshot = save_moe(tmp_path / ("a" * 40), "moe_llama")
    prune_experts(snapshot, tmp_path / ("b" * 40), drop=[1], progress=False)
    patterns = []

    def download(repo_id, revision=None, allow_patterns=None):
        patterns.extend(allow_patterns)
        return str(tmp_path / ("b" * 40))

    monkeypatch.setattr("hf_moe.upcycling.checkpoint.snapshot_download", download)
    expand_experts("someone/moe", tmp_path / "more", progress=False)
    assert "hf_moe.json" in patterns
    provenance = json.loads((tmp_path / "more" / "hf_moe.json").read_text())
    assert provenance["history"][0]["operation"] == "prune"
    assert provenance["parent"]["revision"] == "b" * 40
    assert "base_model: someone/moe" in (tmp_path / "more" / "README.md").read_text()
