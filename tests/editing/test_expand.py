# SPDX-License-Identifier: Apache-2.0
"""Duplicated experts: what transformers computes with them, how they are shared out, and what is refused."""

import json

import pytest
import torch
from conftest import assert_close
from huggingface_hub import ModelCard
from small_moes import (
    SOFTMAX_KINDS,
    assert_same_bits,
    change_tensors,
    load,
    logits,
    record,
    save_moe,
    sparse_block,
    tensors,
)

from hf_moe import RoutingStatistics, expand_experts, merge_experts
from hf_moe.editing import edit
from hf_moe.training.statistics import LayerRouting
from hf_moe.upcycling.errors import UpcycleError


@pytest.mark.parametrize(("kind", "factor"), [*((kind, 2) for kind in SOFTMAX_KINDS), ("mixtral", 3)])
def test_expanding_is_exact(kind, factor, tmp_path):
    values = {"num_experts_per_tok": 1} if factor == 3 else {}
    source = save_moe(tmp_path / "moe", kind, **values)
    report = expand_experts(source, tmp_path / "more", factor=factor, progress=False)
    assert_close(logits(tmp_path / "more"), logits(source))
    model = load(tmp_path / "more")
    assert type(model) is type(load(source))
    assert report.exact
    assert (report.num_experts, report.num_experts_per_tok) == (
        4 * factor,
        factor * values.get("num_experts_per_tok", 2),
    )
    assert model.config.num_experts_per_tok == report.num_experts_per_tok
    assert report.num_parameters == model.num_parameters()
    experts = sparse_block(model.model.layers[2]).experts
    assert len(experts.down_proj) == 4 * factor
    assert torch.equal(experts.gate_up_proj[1], experts.gate_up_proj[5])


def test_a_sigmoid_router_with_a_selection_bias_is_measured(tmp_path):
    source = save_moe(tmp_path / "moe", "deepseek_v3")
    report = expand_experts(source, tmp_path / "more", progress=False)
    assert_close(logits(tmp_path / "more"), logits(source))
    assert report.exact
    provenance = json.loads((tmp_path / "more" / "hf_moe.json").read_text())
    assert "DeepseekV3TopkRouter" in provenance["inexact_because"], "so nothing is claimed"
    bias = load(tmp_path / "more").model.layers[2].mlp.gate.e_score_correction_bias
    assert torch.equal(bias[:4], bias[4:])
    assert bias.abs().max() > 0


def test_a_selection_bias_of_our_class_is_duplicated_too(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama", use_expert_bias=True)
    report = expand_experts(source, tmp_path / "more", progress=False)
    assert not report.exact  # it is added to scores that are half as large now
    provenance = json.loads((tmp_path / "more" / "hf_moe.json").read_text())
    assert "router_type='softmax_topk' with use_expert_bias does not share" in provenance["inexact_because"]
    bias = load(tmp_path / "more").model.layers[2].mlp.gate.e_score_correction_bias
    assert torch.equal(bias[:4], bias[4:])
    assert bias.abs().max() > 0


@pytest.mark.parametrize("original", [True, False])
def test_names_on_disk_stay(original, tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral", save_original_format=original, max_shard_size="30KB")
    expand_experts(source, tmp_path / "more", max_shard_size="30KB", progress=False)
    names = tensors(tmp_path / "more")
    assert len(list((tmp_path / "more").glob("*.safetensors"))) > 2
    assert ("model.layers.2.block_sparse_moe.experts.7.w2.weight" in names) == original
    assert ("model.layers.2.mlp.experts.gate_up_proj" in names) != original
    assert_close(logits(tmp_path / "more"), logits(source))


@pytest.mark.parametrize("values", [{"mlp_bias": True}, {"shared_expert_intermediate_size": 16}])
def test_everything_of_our_classes_comes_along(values, tmp_path):
    layers = {"num_experts_per_layer": [4, 0, 2], "mlp_layer_types": ["sparse", "dense", "sparse"]}
    source = save_moe(tmp_path / "moe", "moe_llama", torch.bfloat16, **layers, **values)
    report = expand_experts(source, tmp_path / "more", progress=False)
    assert load(tmp_path / "more").config.num_experts_per_layer == [8, 0, 4]
    assert report.exact
    assert {tensor.dtype for tensor in tensors(tmp_path / "more").values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["moe_gpt2", "moe_gpt_neox"])
def test_experts_without_a_gate(kind, tmp_path):
    source = save_moe(tmp_path / "moe", kind)
    assert expand_experts(source, tmp_path / "more", progress=False).exact
    assert_close(logits(tmp_path / "more"), logits(source))
    assert merge_experts(
        tmp_path / "more", tmp_path / "back", num_experts=4, num_experts_per_tok=2, progress=False
    ).exact
    assert_same_bits(source, tmp_path / "back")


def test_one_expert_per_token_can_be_kept(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral", num_experts_per_tok=1)
    assert expand_experts(source, tmp_path / "more", keep_top_k=True, progress=False).exact
    assert_close(logits(tmp_path / "more"), logits(source))


def test_keeping_top_k_takes_copies_of_the_best_expert(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    report = expand_experts(source, tmp_path / "more", keep_top_k=True, progress=False)
    assert not report.exact
    assert load(tmp_path / "more").config.num_experts_per_tok == 2
    # Two copies of one expert share its weight, which is what one expert per token computes.
    one = save_moe(tmp_path / "one", "mixtral", num_experts_per_tok=1)
    assert_close(logits(tmp_path / "more"), logits(one))


def test_noise_disturbs_the_copies_only(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama")
    report = expand_experts(source, tmp_path / "more", noise=0.02, progress=False)
    assert not report.exact
    assert 1e-4 < report.max_relative_error < 0.2
    old, new = load(source).model.layers[0].mlp, load(tmp_path / "more").model.layers[0].mlp
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        before, after = old.get_parameter(name), new.get_parameter(name)
        assert torch.equal(after[:4], before)
        relative = (after[4:] - before).std() / before.std()
        assert 0.015 < relative < 0.025
    again = expand_experts(source, tmp_path / "again", noise=0.02, max_shard_size="40KB", progress=False)
    assert again.max_relative_error == report.max_relative_error
    assert_same_bits(tmp_path / "more", tmp_path / "again")
    expand_experts(source, tmp_path / "other", noise=0.02, seed=1, verify=False, progress=False)
    assert not torch.equal(tensors(tmp_path / "other")["model.layers.0.mlp.gate.weight"][4:], new.gate.weight[4:])


def test_experts_with_more_load_get_more_copies(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama")
    counts = torch.tensor([60, 25, 10, 5])
    names = [f"model.layers.{index}.mlp.gate" for index in range(3)]
    RoutingStatistics({name: LayerRouting(counts, 50) for name in names}).save(tmp_path / "statistics.json")
    report = expand_experts(
        source, tmp_path / "more", statistics=tmp_path / "statistics.json", keep_top_k=True, progress=False
    )
    # 60/1, 60/2, 25/1, 60/3: each next copy where the load per copy is largest.
    assert report.details["0"] == [0, 1, 2, 3, 0, 0, 0, 1]
    assert not report.exact
    even = RoutingStatistics({name: LayerRouting(torch.full((4,), 10), 20) for name in names})
    assert expand_experts(source, tmp_path / "even", statistics=even, progress=False).exact


def test_experts_between_which_chance_decides_are_not_claimed(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    change_tensors(source, lambda found: found["model.layers.1.block_sparse_moe.gate.weight"].zero_())
    report = expand_experts(source, tmp_path / "more", progress=False)
    provenance = json.loads((tmp_path / "more" / "hf_moe.json").read_text())
    assert provenance["inexact_because"].startswith("rows of the router are equal in layers [1]")
    assert not report.exact


def test_a_result_that_should_be_exact_and_is_not_fails(tmp_path, monkeypatch):
    source = save_moe(tmp_path / "moe", "mixtral")
    read_expert = edit.MoeCheckpoint.read_expert
    monkeypatch.setattr(
        edit.MoeCheckpoint,
        "read_expert",
        lambda self, block, index: read_expert(self, block, index).map(lambda name, tensor: tensor * 1.01),
    )
    with pytest.raises(UpcycleError, match="does not compute what the source computes.*'expand' should be exact"):
        expand_experts(source, tmp_path / "more", progress=False)
    assert not (tmp_path / "more").exists()
    expand_experts(source, tmp_path / "unseen", verify=False, progress=False)


def test_provenance_and_card(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Moe\n")
    (source / "LICENSE").write_text("mine")
    expand_experts(source, tmp_path / "more", progress=False)
    report = expand_experts(tmp_path / "more", tmp_path / "most", keep_top_k=True, progress=False)
    provenance = json.loads((tmp_path / "most" / "hf_moe.json").read_text())
    assert provenance["operation"] == "expand"
    assert provenance["arguments"]["keep_top_k"] is True
    assert provenance["parent"]["name"] == "more"
    assert list(provenance["parent"]["sha256"]) == ["model.safetensors"]
    assert [entry["arguments"]["keep_top_k"] for entry in provenance["history"]] == [False]
    assert provenance["measured"]["float32"]["max_relative_error"] == report.max_relative_error
    assert (tmp_path / "most" / "LICENSE").read_text() == "mine"
    assert (tmp_path / "most" / "modeling_moe_llama.py").exists()
    card = (tmp_path / "most" / "README.md").read_text()
    phrases = [
        "more, expand: 16 experts, top-4",
        "need not compute",
        "keep_top_k: true",
        "Before that:\n\n- `expand` from `moe`",
    ]
    for phrase in [*phrases, "import hf_moe", "trust_remote_code=True", "| float32 |"]:
        assert phrase in card, phrase
    for phrase in ["None", "{{", str(tmp_path), "base_model"]:
        assert phrase not in card, phrase
    data = ModelCard.load(tmp_path / "most" / "README.md").data
    assert (data.license, data.pipeline_tag) == ("mit", "text-generation")
    assert {"moe", "mixture-of-experts", "edited", "hf_moe"} <= set(data.tags)
    assert "what the source computes, up to rounding" in (tmp_path / "more" / "README.md").read_text()


def test_an_existing_folder_is_safe(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "thesis.txt").write_text("years of work")
    with pytest.raises(UpcycleError, match="exists and is not empty"):
        expand_experts(source, tmp_path / "more")
    with pytest.raises(UpcycleError, match="holds the source"):
        expand_experts(source, source, overwrite=True)
    with pytest.raises(UpcycleError, match="holds no model"):
        expand_experts(source, tmp_path / "more", overwrite=True)
    (tmp_path / "more" / "config.json").write_text("{}")
    expand_experts(source, tmp_path / "more", overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "more"]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    source = save_moe(tmp_path / "moe", "mixtral")
    expand_experts(source, tmp_path / "whole", progress=False)
    read_expert, calls = edit.MoeCheckpoint.read_expert, []

    def interrupted(self, block, index):
        calls.append(index)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return read_expert(self, block, index)

    monkeypatch.setattr(edit.MoeCheckpoint, "read_expert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        expand_experts(source, tmp_path / "more", progress=False)
    with pytest.raises(UpcycleError, match="another model, or with another recipe"):
        expand_experts(source, tmp_path / "more", keep_top_k=True, progress=False)
    expand_experts(source, tmp_path / "more", progress=False)
    assert len(calls) == 12 + 8 + 8, "the first layer was done"
    assert_same_bits(tmp_path / "whole", tmp_path / "more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1}, "`factor` must be at least 2, got 1"),
        ({"noise": -0.1}, "`noise` must be a finite number and not negative, got -0.1"),
        ({"noise": float("nan")}, "`noise` must be a finite number"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(UpcycleError, match=message):
        expand_experts(save_moe(tmp_path / "moe", "mixtral"), tmp_path / "more", **arguments)


def bad_statistics(kind: str, folder, source):
    statistics = record(source)
    layers = dict(statistics.layers)
    match kind:
        case "no file":
            return folder / "nothing.json"
        case "broken file":
            (folder / "broken.json").write_text('{"layers": [1]}')
            return folder / "broken.json"
        case "other names":
            layers = {name.replace("mlp", "moe"): layer for name, layer in layers.items()}
        case "other counts":
            layers["model.layers.1.mlp.gate"] = LayerRouting(torch.ones(5, dtype=torch.int64), 3)
        case "more routers":
            layers["model.layers.3.mlp.gate"] = layers["model.layers.1.mlp.gate"]
        case "no tokens":
            layers["model.layers.1.mlp.gate"] = LayerRouting(torch.zeros(4, dtype=torch.int64), 0)
    return RoutingStatistics(layers)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no file", "There is no file of statistics .*nothing.json"),
        ("broken file", "broken.json holds no statistics that `RoutingStatistics.save` wrote"),
        ("other names", "of another model: they have 0 routers named 'model.layers.0.mlp.gate'"),
        ("other counts", "'model.layers.1.mlp.gate' has 5 experts there and 4 here"),
        ("more routers", "they have 4 routers, and the model has 3"),
        ("no tokens", "saw no tokens in 'model.layers.1.mlp.gate'"),
    ],
)
def test_statistics_of_another_model_are_refused(kind, message, tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(UpcycleError, match=message):
        expand_experts(source, tmp_path / "more", statistics=bad_statistics(kind, tmp_path, source))
