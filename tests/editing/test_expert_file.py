# SPDX-License-Identifier: Apache-2.0
"""Experts as files: what is in them, the round trip to the bit, and every reason not to take one."""

import json

import pytest
import torch
from conftest import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_moes import assert_same_bits, load, logits, save_moe

from hf_moe import extract_expert, insert_expert, prune_experts
from hf_moe.editing.expert_file import METADATA, ExpertFile
from hf_moe.upcycling.errors import UpcycleError


KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "moe_llama", "moe_qwen3"]


@pytest.mark.parametrize(("kind", "expert"), [*((kind, 1) for kind in KINDS), ("mixtral", 0), ("mixtral", 3)])
def test_extract_drop_and_insert_is_the_same_model_to_the_bit(kind, expert, tmp_path):
    source = save_moe(tmp_path / "moe", kind, torch.bfloat16, max_shard_size="30KB")
    extract_expert(source, tmp_path / "expert.safetensors", expert=expert, progress=False)
    prune_experts(source, tmp_path / "less", drop=[expert], verify=False, progress=False)
    report = insert_expert(
        tmp_path / "less", tmp_path / "expert.safetensors", tmp_path / "back", position=expert, progress=False
    )
    assert_same_bits(source, tmp_path / "back")
    configs = [load(folder).config.to_diff_dict() for folder in (source, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert report.num_experts == 4
    assert [
        entry["operation"] for entry in json.loads((tmp_path / "back" / "hf_moe.json").read_text())["history"]
    ] == ["prune"]


@pytest.mark.parametrize("values", [{"mlp_bias": True}, {"shared_expert_intermediate_size": 16}])
def test_biases_and_shared_experts(values, tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama", **values)
    file = extract_expert(source, tmp_path / "expert.safetensors", expert=1, progress=False)
    assert ("layers.0.gate_bias" in file.tensors) == ("mlp_bias" in values)
    prune_experts(source, tmp_path / "less", drop=[1], verify=False, progress=False)
    insert_expert(tmp_path / "less", file.path, tmp_path / "back", position=1, verify=False, progress=False)
    assert_same_bits(source, tmp_path / "back")


def test_what_is_in_the_file(tmp_path):
    source = save_moe(tmp_path / "moe", "qwen3_moe")
    file = extract_expert(source, tmp_path / "new" / "expert.safetensors", expert=2, progress=False)
    assert file.layers == [0, 2]
    with safe_open(tmp_path / "new" / "expert.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    parts = ["gate_proj", "up_proj", "down_proj", "router.weight"]
    assert names == {f"layers.{index}.{part}" for index in (0, 2) for part in parts}
    block = load(source).model.layers[2].mlp
    assert torch.equal(torch.cat(file.expert(2)[:2]), block.experts.gate_up_proj[2])
    assert torch.equal(file.expert(2).down_proj, block.experts.down_proj[2])
    assert torch.equal(file.row(2, "weight"), block.gate.weight[2])
    metadata = file.metadata
    assert metadata["source"]["name"] == "moe"
    assert len(metadata["source"]["sha256"]["model.safetensors"]) == 64
    fitting = {"hidden_size": 32, "intermediate_size": 24, "activation": "SiLUActivation", "dtype": "float32"}
    assert {name: metadata[name] for name in fitting} == fitting
    assert (metadata["expert"], metadata["model_type"], metadata["router_type"]) == (2, "qwen3_moe", "softmax_topk")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["expert.safetensors"]


@pytest.mark.parametrize(("layers", "chosen"), [(None, [0, 1, 2]), ([2, 0], [0, 2]), ("1-2", [1, 2]), ("-1:", [2])])
def test_layers_of_the_file(layers, chosen, tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    assert extract_expert(source, tmp_path / "e.safetensors", expert=0, layers=layers, progress=False).layers == chosen


@torch.no_grad()
def test_an_expert_moves_between_layouts(tmp_path):
    source = save_moe(tmp_path / "mixtral", "mixtral", intermediate_size=24)
    file = extract_expert(source, tmp_path / "expert.safetensors", expert=1, progress=False)
    own = save_moe(tmp_path / "own", "moe_llama", head_dim=8)
    report = insert_expert(own, file.path, tmp_path / "more", progress=False)
    assert (report.num_experts, report.num_experts_per_tok) == (5, 2)
    new, old = load(tmp_path / "more").model.layers[1].mlp, load(source).model.layers[1].mlp
    assert torch.equal(new.experts.gate_up_proj[4], old.experts.gate_up_proj[1])
    assert torch.equal(new.gate.weight[4], old.gate.weight[1])
    hidden_states = torch.randn(1, 3, 32)
    expected = old.experts(hidden_states[0], torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert_close(new.experts(hidden_states[0], torch.full((3, 1), 4), torch.ones(3, 1)), expected)


def test_replacing(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    file = extract_expert(source, tmp_path / "expert.safetensors", expert=1, layers=[2], progress=False).path
    same = insert_expert(source, file, tmp_path / "same", position=1, replace=True, progress=False)
    assert same.max_relative_error == 0.0
    assert_same_bits(source, tmp_path / "same")
    insert_expert(source, file, tmp_path / "other", position=3, replace=True, progress=False)
    old, new = load(source).model.layers, load(tmp_path / "other").model.layers
    assert torch.equal(new[2].mlp.experts.down_proj, old[2].mlp.experts.down_proj[[0, 1, 2, 1]])
    assert torch.equal(new[2].mlp.gate.weight, old[2].mlp.gate.weight[[0, 1, 2, 1]])
    assert torch.equal(new[1].mlp.experts.down_proj, old[1].mlp.experts.down_proj)


def test_some_layers_of_our_class_can_get_an_expert(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama")
    file = extract_expert(source, tmp_path / "expert.safetensors", expert=0, layers=[1], progress=False).path
    insert_expert(source, file, tmp_path / "more", progress=False)
    assert load(tmp_path / "more").config.num_experts_per_layer == [4, 5, 4]
    assert logits(tmp_path / "more").isfinite().all()


def test_an_expert_that_nobody_takes_changes_nothing(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    path = tmp_path / "expert.safetensors"
    file = extract_expert(source, path, expert=0, progress=False)
    rows = {name: torch.zeros(32) for name in file.tensors if name.endswith("router.weight")}
    save_file(file.tensors | rows, path, metadata={METADATA: json.dumps(file.metadata)})
    report = insert_expert(source, path, tmp_path / "more", progress=False)
    assert report.max_relative_error > 0, "a logit of zero is not the smallest one"
    provenance = json.loads((tmp_path / "more" / "hf_moe.json").read_text())
    assert provenance["details"]["from"]["name"] == "moe"
    assert len(provenance["arguments"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert": 4}, "There is no expert 4 in every layer that was asked for: they have 0 to 3"),
        ({"expert": -1}, "There is no expert -1 in every layer"),
        ({"expert": 0, "layers": [1]}, "`layers`=\\[1\\] must name sparse layers, which are \\[0, 2\\]"),
        ({"expert": 0, "layers": "7"}, "`layers`='7' must name sparse layers"),
        ({"expert": 0, "layers": []}, "must name sparse layers"),
    ],
)
def test_what_cannot_be_extracted(arguments, message, tmp_path):
    with pytest.raises(UpcycleError, match=message):
        extract_expert(
            save_moe(tmp_path / "moe", "qwen3_moe"), tmp_path / "e.safetensors", progress=False, **arguments
        )
    assert not (tmp_path / "e.safetensors").exists()


def test_an_existing_file_is_not_overwritten(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    (tmp_path / "e.safetensors").write_text("mine")
    with pytest.raises(UpcycleError, match="e.safetensors exists. Choose another file, or pass overwrite=True"):
        extract_expert(source, tmp_path / "e.safetensors", expert=0)
    assert (tmp_path / "e.safetensors").read_text() == "mine"
    extract_expert(source, tmp_path / "e.safetensors", expert=0, overwrite=True, progress=False)
    assert ExpertFile(tmp_path / "e.safetensors").metadata["expert"] == 0
    with pytest.raises(UpcycleError, match="moe exists"):
        extract_expert(source, source, expert=0, overwrite=True)


def make_file(kind: str, folder):
    """An expert that does not fit a float32 Mixtral of [`save_moe`]."""
    values = {
        "hidden_size": {"hidden_size": 64},
        "intermediate_size": {"intermediate_size": 40},
        "activation": {"hidden_act": "gelu"},
        "layers": {"num_hidden_layers": 4},
    }.get(kind, {})
    path = folder / "expert.safetensors"
    if kind == "missing":
        return path
    model = {"router_type": "deepseek_v3", "has_bias": "moe_llama"}.get(kind, "mixtral")
    if kind == "router_type":
        values = {"first_k_dense_replace": 0, "moe_intermediate_size": 48}
    if kind == "has_bias":
        values = {"mlp_bias": True, "moe_intermediate_size": 48}
    source = save_moe(folder / "other", model, torch.bfloat16 if kind == "dtype" else torch.float32, **values)
    layers = [0, 2] if kind == "some layers" else None
    file = extract_expert(source, path, expert=0, layers=layers, progress=False)
    changed = dict(file.tensors)
    match kind:
        case "other file":
            save_file(load_file(source / "model.safetensors"), path)
            return path
        case "text":
            path.write_text("an expert")
            return path
        case "cut":
            changed["layers.1.up_proj"] = changed["layers.1.up_proj"][:7].clone()
        case "row gone":
            del changed["layers.2.router.weight"]
        case "nan":
            changed["layers.2.up_proj"][0, 0] = float("nan")
    if kind in ("cut", "row gone", "nan"):
        save_file(changed, path, metadata={METADATA: json.dumps(file.metadata)})
    return path


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("hidden_size", {}, "does not fit: it has hidden_size=64, and those of .* have hidden_size=32"),
        ("intermediate_size", {}, "it has intermediate_size=40, and those of .* have intermediate_size=48"),
        ("activation", {}, "it has activation='GELUActivation', and .* have activation='SiLUActivation'"),
        ("dtype", {}, "it has dtype='bfloat16', and those of .* have dtype='float32'"),
        ("has_bias", {}, "it has has_bias=True, and those of .* have has_bias=False"),
        (
            "router_type",
            {},
            "it has router_type='DeepseekV3TopkRouter', and those of .* have router_type='softmax_topk'",
        ),
        ("layers", {}, "has an expert for layer 3, but the sparse layers of .* are \\[0, 1, 2\\]"),
        ("some layers", {}, "All layers of MixtralForCausalLM have one number of experts"),
        ("missing", {}, "There is no file .*expert.safetensors"),
        ("other file", {}, "is no expert that `extract_expert` wrote"),
        ("text", {}, "is no expert that `extract_expert` wrote"),
        ("cut", {}, "is damaged or does not fit: 'layers.1.up_proj' should be"),
        ("row gone", {}, "is damaged or does not fit: 'layers.2.router.weight' should be .* and is None"),
        ("nan", {}, "'layers.2.up_proj' holds NaN"),
        ("fits", {"position": 5}, "`position` must lie between 0 and 4 in layer 0, got 5"),
        ("fits", {"position": 4, "replace": True}, "`position` must lie between 0 and 3 in layer 0, got 4"),
        ("fits", {"replace": True}, "`replace` needs the `position`"),
    ],
)
def test_what_cannot_be_inserted(kind, arguments, message, tmp_path):
    path = make_file(kind, tmp_path)
    source = save_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(UpcycleError, match=message):
        insert_expert(source, path, tmp_path / "more", progress=False, **arguments)
    assert not (tmp_path / "more").exists()
