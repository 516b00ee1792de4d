# SPDX-License-Identifier: Apache-2.0
"""Editing models with each of hf_moe's routers: what is promised is measured, what is refused is refused for a true reason."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import dense_model

from hf_moe import (
    UpcycleConfig,
    collapse,
    expand_experts,
    extract_expert,
    insert_expert,
    merge_experts,
    prune_experts,
    upcycle,
)
from hf_moe.upcycling.errors import UpcycleError


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, NUM_EXPERTS, build_model


# What a model with twice the experts, of which a token takes twice as many, is: the same, another one, or refused.
SHIFTED = "which other numbers of experts would shift"
EXPANDED = {
    "soft": True,
    "noisy_topk": True,
    "hierarchical_noisy_topk": "holds a row for each group of experts",
    "gshard": "gives a token 2 of the experts, whatever their number, and cannot give it 4",
    "switch": "gives a token 1 of the experts, whatever their number, and cannot give it 2",
    "softmax_topk": True,
    "sigmoid_topk": SHIFTED,
    "llama4": False,
    "attention": True,
    "normalized_logits": False,
    "expert_choice": True,
    "top_p": False,
    "relu": False,
    "prototypes": SHIFTED,
    "grouped": SHIFTED,
    "hash": "holds a table of the experts of every token id",
    "modality": SHIFTED,
    "hierarchical": "holds a row for each group of experts",
    "zero-computation experts": "holds rows for 4 zero-computation experts",
    "a selection bias": False,
    "groups of DeepSeek-V2": SHIFTED,
    "capacity by position": True,
    "capacity by probability": True,
    "capacity by batch priority": True,
    "capacity with zero-computation experts": "holds rows for 2 zero-computation experts",
}


@pytest.fixture
def source(request, tmp_path) -> Path:
    build_model(request.param).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def test_every_case_is_here():
    assert set(EXPANDED) == set(ALL_CASES)


@pytest.mark.parametrize(("source", "expected"), EXPANDED.items(), indirect=["source"])
def test_expanded(source, expected, tmp_path):
    if isinstance(expected, str):
        with pytest.raises(UpcycleError, match=expected):
            expand_experts(source, tmp_path / "new", progress=False)
        return
    report = expand_experts(source, tmp_path / "new", progress=False)
    assert (report.inexact_because is None) == report.exact == expected
    assert expected or report.max_relative_error > 1e-2
    if expected:  # and back again
        merged = merge_experts(
            tmp_path / "new",
            tmp_path / "old",
            num_experts=8,
            num_experts_per_tok=report.num_experts_per_tok // 2,
            progress=False,
        )
        assert merged.inexact_because is None
        assert merged.exact


@pytest.mark.parametrize("source", ["hash", "hierarchical", "zero-computation experts"], indirect=True)
def test_what_holds_more_than_rows_is_refused_everywhere(source, tmp_path):
    for edit in (
        lambda: collapse(source, tmp_path / "new", progress=False),
        lambda: extract_expert(source, tmp_path / "one.safetensors", expert=0, progress=False),
    ):
        with pytest.raises(UpcycleError, match="can neither edit, collapse nor extract experts") as error:
            edit()
        assert "take that in place of a collapsed one" in str(error.value)
        has_domains = transformers.AutoConfig.from_pretrained(source).num_hash_domains > 1
        assert ("`hf_moe.extract_domain`" in str(error.value)) == has_domains


def test_a_matrix_of_experts_by_experts_is_refused(tmp_path):
    build_model("softmax_topk", router_residual=True).save_pretrained(tmp_path / "moe")
    source, new, file = tmp_path / "moe", tmp_path / "new", tmp_path / "one.safetensors"
    for edit in (
        lambda: expand_experts(source, new, progress=False),
        lambda: prune_experts(source, new, drop=[1], progress=False),
        lambda: merge_experts(source, new, num_experts=4, progress=False),
        lambda: extract_expert(source, file, expert=0, progress=False),
    ):
        with pytest.raises(UpcycleError, match="has `router_residual`: .* upcycle the dense model again"):
            edit()
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("source", ["switch"], indirect=True)
def test_a_router_with_one_number_of_experts_per_token(source, tmp_path):
    report = expand_experts(source, tmp_path / "new", keep_top_k=True, progress=False)
    assert (report.num_experts, report.num_experts_per_tok) == (2 * NUM_EXPERTS, 1)
    assert not report.exact
    assert "keep_top_k" in report.inexact_because


@pytest.mark.parametrize("source", ["top_p", "relu"], indirect=True)
def test_where_the_number_of_experts_does_not_follow_top_k_it_is_no_reason(source, tmp_path):
    reasons = {
        keep_top_k: expand_experts(
            source, tmp_path / str(keep_top_k), keep_top_k=keep_top_k, progress=False
        ).inexact_because
        for keep_top_k in (False, True)
    }
    assert reasons[True] == reasons[False]
    assert "does not share a weight out among copies" in reasons[True]


@pytest.mark.parametrize("source", ["soft"], indirect=True)
def test_a_router_that_takes_all_experts(source, tmp_path):
    """It takes all that are left, or one more."""
    assert prune_experts(source, tmp_path / "pruned", drop=[1], progress=False).num_experts_per_tok == 7
    assert merge_experts(source, tmp_path / "merged", num_experts=3, progress=False).num_experts_per_tok == 3
    extract_expert(source, tmp_path / "one.safetensors", expert=1, progress=False)
    inserted = insert_expert(source, tmp_path / "one.safetensors", tmp_path / "inserted", progress=False)
    assert inserted.num_experts_per_tok == 9
    with pytest.raises(
        UpcycleError, match=r"all of the experts, 16 here, and cannot give it 8: leave out `keep_top_k`"
    ):
        expand_experts(source, tmp_path / "expanded", keep_top_k=True, progress=False)


@pytest.mark.parametrize("source", ["a selection bias"], indirect=True)
@pytest.mark.parametrize("similarity", ["weights", "router"])
def test_merging_with_a_selection_bias(source, similarity, tmp_path):
    report = merge_experts(source, tmp_path / "new", num_experts=4, similarity=similarity, progress=False)
    before = transformers.AutoModelForCausalLM.from_pretrained(source)
    after = transformers.AutoModelForCausalLM.from_pretrained(report.output_dir)
    for index, groups in report.details.items():
        old, new = (model.model.layers[int(index)].mlp.gate.e_score_correction_bias for model in (before, after))
        assert torch.allclose(new, torch.stack([old[members].mean() for members in groups]))


# Which go back to the dense model from which `copy` made them, whatever was done to make up for their weights.
COLLAPSED = [name for name, expected in EXPANDED.items() if not (isinstance(expected, str) and "holds" in expected)]


@pytest.mark.parametrize("case", COLLAPSED)
def test_collapsed_copies_are_the_dense_model(case, tmp_path):
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    fields = {"num_experts_per_tok": 2, **copy.deepcopy(ALL_CASES[case])}
    own = {
        name: fields.pop(name) for name in ("router_type", "num_experts_per_tok", "norm_topk_prob") if name in fields
    }
    own["router_init"] = "normal" if case == "relu" else "zero"  # with zeros it would choose nothing
    recipe = UpcycleConfig(num_experts=NUM_EXPERTS, target="hf_moe", router_options=fields, **own)
    upcycled = upcycle(tmp_path / "dense", tmp_path / "moe", recipe, progress=False)
    report = collapse(tmp_path / "moe", tmp_path / "again", progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.allclose(again[name], tensor, rtol=1e-5, atol=1e-7), name
    assert report.exact == upcycled.exact
    assert (report.inexact_because is None) == upcycled.exact


def test_equal_experts_whose_weights_do_not_sum_to_1_are_not_promised(tmp_path):
    """Without a recipe nothing has made up for Switch's weight, nor for DeepSeek-V3's factor."""
    for case, values in (("switch", {}), ("sigmoid_topk", {})):
        model = build_model(case, **values)
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.data[:] = parameter.data[:1].clone()
        model.save_pretrained(tmp_path / case)
        report = collapse(tmp_path / case, tmp_path / f"{case}-dense", progress=False)
        assert report.inexact_because == "the weights of the chosen experts do not sum to 1"


def test_what_another_modality_loses_is_measured(tmp_path):
    """Experts of the images that do something else: the first one of the text serves text as before, and images not at all."""
    dense_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    recipe = UpcycleConfig(
        num_experts=4, router_type="modality", router_options={"num_experts_per_modality": [2, 2]}, target="hf_moe"
    )
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data[2:] *= -1
    model.save_pretrained(tmp_path / "trained")
    report = collapse(tmp_path / "trained", tmp_path / "text", expert=0, progress=False)
    assert not report.exact
    assert report.max_relative_error > 0.1
    assert (report.measured["num_tokens"], report.measured["in_each_of"]) == (512, "2 modalities")
    card = (tmp_path / "text" / "README.md").read_text()
    assert "512 tokens of random input, the same in each of 2 modalities" in card
    assert "| in_each_of" not in card
