# SPDX-License-Identifier: Apache-2.0
"""Removed experts: which go, and that the rest computes what transformers' own class computes without them."""

import json

import pytest
import torch
from conftest import assert_close
from small_moes import SOFTMAX_KINDS, load, logits, record, save_moe

from hf_moe import RoutingStatistics, prune_experts
from hf_moe.training.statistics import LayerRouting
from hf_moe.upcycling.errors import UpcycleError


@pytest.mark.parametrize("kind", [*SOFTMAX_KINDS, "deepseek_v3"])
@torch.no_grad()
def test_a_router_that_never_takes_it_is_the_same_as_no_expert(kind, tmp_path):
    source = save_moe(tmp_path / "moe", kind)
    report = prune_experts(source, tmp_path / "less", drop=[2], progress=False)
    model = load(source)
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "block_sparse_moe.router")):
            module.register_forward_hook(without_expert_two(module))
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    assert_close(logits(tmp_path / "less"), model(ids).logits)
    assert (report.num_experts, report.num_experts_per_tok) == (3, 2)
    assert not report.exact
    assert report.max_relative_error > 1e-3


def without_expert_two(gate: torch.nn.Module):
    """A hook that gives what the router would choose if the logit of expert 2 were minus infinity."""
    smaller = type(gate).__new__(type(gate))
    torch.nn.Module.__init__(smaller)
    smaller.__dict__.update({name: value for name, value in vars(gate).items() if not name.startswith("_")})
    left = torch.tensor([0, 1, 3])
    smaller.weight = torch.nn.Parameter(gate.weight[left])
    for name, buffer in gate._buffers.items():
        smaller.register_buffer(name, None if buffer is None else buffer[left])
    for name in ("num_experts", "n_routed_experts"):
        if hasattr(smaller, name):
            setattr(smaller, name, 3)

    def hook(module, args, output):
        router_logits, weights, index = smaller(*args)
        return router_logits, weights, left[index]

    return hook


def test_the_least_loaded_experts_go(tmp_path):
    source = save_moe(tmp_path / "moe", "qwen3_moe")
    counts = {0: [4, 9, 1, 6], 2: [5, 5, 0, 5]}
    names = {index: f"base_model.model.model.layers.{index}.mlp.gate" for index in counts}
    statistics = RoutingStatistics({names[index]: LayerRouting(torch.tensor(counts[index]), 10) for index in counts})
    report = prune_experts(source, tmp_path / "less", keep=2, statistics=statistics, progress=False)
    assert report.details == {"0": [1, 3], "2": [0, 1]}
    old, new = load(source).model.layers, load(tmp_path / "less").model.layers
    assert torch.equal(new[0].mlp.experts.gate_up_proj, old[0].mlp.experts.gate_up_proj[[1, 3]])
    assert torch.equal(new[0].mlp.gate.weight, old[0].mlp.gate.weight[[1, 3]])
    assert torch.equal(new[1].mlp.gate_proj.weight, old[1].mlp.gate_proj.weight)


def test_recorded_statistics_of_our_class(tmp_path):
    source = save_moe(tmp_path / "moe", "moe_llama", shared_expert_intermediate_size=16)
    statistics = record(source)
    statistics.save(tmp_path / "statistics.json")
    report = prune_experts(source, tmp_path / "less", keep=3, statistics=tmp_path / "statistics.json", progress=False)
    for index in range(3):
        least = int(statistics[f"model.layers.{index}.mlp.gate"].counts.argmin())
        assert report.details[str(index)] == [expert for expert in range(4) if expert != least]
    old, new = load(source).model.layers, load(tmp_path / "less").model.layers
    assert torch.equal(new[1].mlp.shared_expert.down_proj.weight, old[1].mlp.shared_expert.down_proj.weight)
    provenance = json.loads((tmp_path / "less" / "hf_moe.json").read_text())
    assert provenance["arguments"]["statistics"] == "statistics.json"
    assert provenance["details"] == report.details
    card = (tmp_path / "less" / "README.md").read_text()
    assert "tokens that took a removed expert take another one" in card


def test_layers_that_differ_become_equal(tmp_path):
    layers = {"num_experts_per_layer": [4, 3, 4], "shared_expert_intermediate_size": 16}
    source = save_moe(tmp_path / "moe", "moe_llama", **layers)
    prune_experts(source, tmp_path / "less", keep=2, statistics=record(source), progress=False)
    config = load(tmp_path / "less").config
    assert (config.num_experts, config.num_experts_per_layer) == (2, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either how many experts to `keep` or which to `drop`, got keep=None and drop=None"),
        ({"keep": 2, "drop": [1]}, "either how many experts to `keep` or which to `drop`"),
        ({"keep": 2}, "`keep` needs `statistics`"),
        ({"drop": [1], "statistics": "statistics.json"}, "`drop` has no use for them"),
        ({"keep": 4, "statistics": None}, "`keep` must lie between 1 and 3"),
        ({"keep": 1, "statistics": None}, "A token takes 2 experts .*, but only 1 would be left"),
        ({"drop": []}, "`drop` must name at least one expert"),
        ({"drop": [1, 1]}, "each once, got \\[1, 1\\]"),
        ({"drop": [4]}, "`drop` names \\[4\\], but layer 0 has experts 0 to 3"),
        ({"drop": [0, 1, 2]}, "only 1 would be left"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    if "statistics" in arguments and arguments["statistics"] is None:
        arguments = {**arguments, "statistics": record(source)}
    with pytest.raises(UpcycleError, match=message):
        prune_experts(source, tmp_path / "less", **arguments)
    assert not (tmp_path / "less").exists()


def test_the_source_is_left_alone(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    prune_experts(source, tmp_path / "less", drop=[0], progress=False)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
