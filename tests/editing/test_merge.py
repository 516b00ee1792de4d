# SPDX-License-Identifier: Apache-2.0
"""Merged experts: which go together, what their mean is, and when nothing is lost."""

import json

import pytest
import torch
from conftest import assert_close, dense_model, save_tokenizer
from small_moes import SOFTMAX_KINDS, assert_same_bits, change_tensors, load, logits, save_moe

from hf_moe import RoutingStatistics, UpcycleConfig, expand_experts, merge_experts, upcycle
from hf_moe.editing.merge import group_similar, similarity_of, weighted_mean
from hf_moe.editing.moe_checkpoint import MoeCheckpoint
from hf_moe.training.statistics import LayerRouting
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.feed_forward import FeedForward


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.bfloat16) for kind in SOFTMAX_KINDS), ("mixtral", torch.float32)]
)
def test_merging_undoes_expanding_to_the_bit(kind, dtype, tmp_path):
    source = save_moe(tmp_path / "moe", kind, dtype)
    expand_experts(source, tmp_path / "more", factor=3, verify=False, progress=False)
    report = merge_experts(tmp_path / "more", tmp_path / "back", num_experts=4, num_experts_per_tok=2, progress=False)
    assert report.exact
    assert json.loads((tmp_path / "back" / "hf_moe.json").read_text())["inexact_because"] is None
    assert report.details["0"] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert_same_bits(source, tmp_path / "back")


def test_equal_experts_of_unequal_rows_are_told_apart_by_their_rows(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4), progress=False)
    expand_experts(tmp_path / "moe", tmp_path / "more", verify=False, progress=False)
    report = merge_experts(tmp_path / "more", tmp_path / "back", num_experts=4, num_experts_per_tok=2, progress=False)
    assert report.details["1"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert_same_bits(tmp_path / "moe", tmp_path / "back")


def test_experts_that_are_alike_go_together(tmp_path):
    source = save_moe(tmp_path / "moe", "qwen2_moe")
    expand_experts(source, tmp_path / "more", noise=0.05, verify=False, progress=False)
    counts = torch.tensor([3, 1, 1, 0, 1, 1, 0, 0])
    statistics = RoutingStatistics({f"model.layers.{index}.mlp.gate": LayerRouting(counts, 4) for index in range(3)})
    for similarity in ("weights", "router"):
        report = merge_experts(
            tmp_path / "more",
            tmp_path / similarity,
            num_experts=4,
            similarity=similarity,
            statistics=statistics,
            progress=False,
        )
        assert report.details["2"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert not report.exact
    old, new = load(tmp_path / "more").model.layers[0].mlp, load(tmp_path / "weights").model.layers[0].mlp
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        before, after = old.get_parameter(name), new.get_parameter(name)
        assert_close(after[0], 0.75 * before[0] + 0.25 * before[4])
        assert_close(after[1], 0.5 * before[1] + 0.5 * before[5])
        assert torch.equal(after[2], before[2]), "the other one has no load"
        assert_close(after[3], 0.5 * before[3] + 0.5 * before[7])
    assert torch.equal(new.shared_expert_gate.weight, old.shared_expert_gate.weight)


@pytest.mark.parametrize("kind", ["mixtral", "moe_llama"])
@pytest.mark.parametrize("values_at_once", [1, 10_000, 2**24])
def test_similarity_is_the_cosine_of_all_weights(kind, values_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.editing.merge.VALUES_AT_ONCE", values_at_once)
    moe = MoeCheckpoint(save_moe(tmp_path / "moe", kind))
    experts = load(tmp_path / "moe").model.layers[1].mlp.experts
    flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1).double()
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat, dim=-1)
    assert_close(similarity_of(moe, moe.blocks[1], "weights"), expected, 1e-5)


def test_groups_are_joined_by_their_mean_similarity():
    similarity = torch.eye(5, dtype=torch.float64)
    for one, other, value in [(0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.1), (3, 4, 0.5)]:
        similarity[one, other] = similarity[other, one] = value
    assert group_similar(similarity, 5) == [[0], [1], [2], [3], [4]]
    assert group_similar(similarity, 4) == [[0, 1], [2], [3], [4]]
    # (0.8 + 0.1) / 2 is less than 0.5, although 0.8 is more.
    assert group_similar(similarity, 3) == [[0, 1], [2], [3, 4]]
    assert group_similar(similarity, 2) == [[0, 1, 2], [3, 4]]
    assert group_similar(similarity, 1) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_mean_of_equal_values_is_the_value_to_the_bit(dtype, count):
    values = torch.randn(50, 40).to(dtype)
    values[0, 0] = -0.0
    expert = FeedForward(None, values, values.T)
    shares = torch.rand(count, dtype=torch.float64)
    mean = weighted_mean([expert] * count, shares / shares.sum())
    bits = {2: torch.int16, 4: torch.int32}[values.itemsize]
    assert torch.equal(mean.up_proj.view(bits), values.view(bits))


def test_what_is_not_exact_is_not_claimed(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    expand_experts(source, tmp_path / "more", verify=False, progress=False)

    def inexact_because(name: str, **arguments) -> str:
        merge_experts(tmp_path / "more", tmp_path / name, progress=False, **arguments)
        return json.loads((tmp_path / name / "hf_moe.json").read_text())["inexact_because"]

    assert "does not take all members" in inexact_because("top-4", num_experts=4)
    assert "does not take all members" in inexact_because("unequal", num_experts=3, num_experts_per_tok=1)
    name = "model.layers.1.block_sparse_moe.experts.6.w3.weight"
    change_tensors(tmp_path / "more", lambda found: found[name].mul_(1.001))
    exact = {"num_experts": 4, "num_experts_per_tok": 2}
    assert inexact_because("expert", **exact) == "experts that are merged in layer 1 differ"
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    change_tensors(tmp_path / "more", lambda found: found[gate][5].mul_(1.001))
    assert inexact_because("row", **exact) == "the rows of the router that are merged in layer 1 differ"
    change_tensors(tmp_path / "more", lambda found: found[gate].zero_())
    assert "chance decides" in inexact_because("zero", **exact)
    assert not torch.allclose(logits(tmp_path / "zero"), logits(source))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 4}, "`num_experts` must lie between 1 and 3, one less than the experts there are, got 4"),
        ({"num_experts": 0}, "`num_experts` must lie between 1 and 3"),
        ({"num_experts": 1}, "A token takes 2 experts .*, but only 1 would be left"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "A token takes 3 experts"),
        ({"num_experts": 2, "num_experts_per_tok": 0}, "`num_experts_per_tok` must be at least 1, got 0"),
        (
            {"num_experts": 2, "similarity": "taste"},
            "`similarity` must be one of \\['weights', 'router'\\], got 'taste'",
        ),
        ({"num_experts": 2, "statistics": "nothing.json"}, "There is no file of statistics nothing.json"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(UpcycleError, match=message):
        merge_experts(source, tmp_path / "less", **arguments)
