# SPDX-License-Identifier: Apache-2.0
"""Scores of experts beside a loop over tokens and the routing recorder; selections beside those that ESFT published."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from small_adapters import ids
from small_models import small_moe

from hf_moe import ExpertScores, ExpertSelection, RoutingRecorder, score_experts, select_experts
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.models.routers import ROUTERS


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, NUM_EXPERTS, build_model, with_routing_inputs


# Token scores of ESFT for its task "intent" (DeepSeek-V2-Lite, 64 experts) and the experts that it selected with top_p 0.2:
# results/expert_scores/intent/summary.json and results/expert_configs/intent.json of github.com/deepseek-ai/ESFT (MIT).
INTENT = {
    13: (
        """0.0028 0.0057 0.0063 0.0002 0.0056 0.021 0.0625 0.0117 0.0065 0.0082 0.0155 0.0367 0.0023 0.0108 0.0099 0.013
        0.0037 0.0209 0.0104 0.0271 0.0054 0.0209 0.0079 0.016 0.0111 0.0034 0.0214 0.0077 0.0028 0.0538 0.0224 0.018
        0.0063 0.0424 0.0196 0.0125 0.0195 0.0621 0.0102 0.0121 0.0031 0.0233 0.0072 0.0055 0.0205 0.0079 0.0042 0.0076
        0.0142 0.0203 0.0016 0.0011 0.0082 0.0053 0.0067 0.0417 0.0054 0.0402 0.0205 0.0061 0.0022 0.0338 0.0111 0.0462""",
        [6, 37, 29, 63],
    ),
    2: (
        """0.025 0.0102 0.0147 0.0138 0.0081 0.0047 0.0231 0.0089 0.0133 0.0128 0.0066 0.0055 0.016 0.0117 0.0307 0.0116
        0.0099 0.0146 0.0087 0.0412 0.0083 0.004 0.0129 0.0033 0.0246 0.015 0.0054 0.0134 0.0087 0.0043 0.0193 0.0067
        0.0055 0.0224 0.0291 0.0344 0.0274 0.014 0.0164 0.0162 0.0098 0.0087 0.0312 0.0061 0.0157 0.0096 0.0168 0.0376
        0.0099 0.0043 0.0071 0.0258 0.0114 0.009 0.0145 0.0134 0.0028 0.0457 0.0082 0.03 0.0359 0.0131 0.0214 0.0297""",
        [57, 19, 47, 60, 35, 42],
    ),
}


# Weights that are divided after what is dropped, and weights that are applied to the experts' inputs.
DROPPING = {
    "gshard that drops": {"normalize_router_prob_before_dropping": False},
    "llama4 that drops": {"capacity_policy": "position"},
}


def batches(padding: bool = True) -> list[dict[str, torch.Tensor]]:
    first, second = ids(2), ids(3, 7).flip(0)
    mask = torch.ones_like(first)
    if padding:
        mask[0, :5] = 0
    return [{"input_ids": first, "attention_mask": mask, "labels": first}, {"input_ids": second}]


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss", "moe_llama"])
def test_token_scores_are_the_load(kind):
    model = small_moe(kind)
    with RoutingRecorder(model) as recorder, torch.no_grad():
        for batch in batches():
            model(**batch)
    expected = [layer.load for layer in recorder.statistics().layers.values()]
    scores = score_experts(model, batches())
    assert scores.num_tokens == 2 * 12 - 5 + 21
    assert len(scores.layers) == len(expected)
    for found, load in zip(scores.layers.values(), expected, strict=True):
        torch.testing.assert_close(found, load)


def test_gate_scores_are_mean_routing_weights():
    model = small_moe("mixtral")
    sums = torch.zeros(3, 4, dtype=torch.float64)
    seen = 0
    for batch in batches():
        with torch.no_grad():
            logits = model(**{**batch, "output_router_logits": True}).router_logits
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1)
        for layer, of_layer in enumerate(logits):
            for token, row in enumerate(of_layer):
                if kept[token]:
                    weights, chosen = row.softmax(-1).topk(2)
                    for weight, expert in zip(weights / weights.sum(), chosen, strict=True):
                        sums[layer, expert] += weight.item()
        seen += int(kept.sum())
    scores = score_experts(model, batches(), kind="gate")
    for layer, found in scores.layers.items():
        assert_close(found, sums[layer] / seen)
        assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("case", [*ALL_CASES, "gshard that drops", "llama4 that drops"])
def test_scores_of_every_router_are_those_of_a_loop_over_slots(case, batch):
    """Beside what the block decides to run, whichever way it then hands that to its experts."""
    name = case.removesuffix(" that drops")
    drops = name != case or "capacity_policy" in ALL_CASES[name]
    made = build_model(
        name, **({"eval_capacity_factor": 0.7, "min_capacity": 1} if drops else {}), **DROPPING.get(case, {})
    )
    seen = []
    for layer in made.model.layers:
        original = layer.mlp._run_experts
        layer.mlp._run_experts = lambda states, index, weights, run=original: (
            seen.append((index, weights)) or run(states, index, weights)
        )
    given = with_routing_inputs(batch, made)
    token_scores, gate_scores = (score_experts(made, [given], kind=kind).layers for kind in ("token", "gate"))
    is_token = batch["attention_mask"].flatten().tolist()
    for layer, (index_TK, weights_TK) in enumerate(seen[:3]):
        slots, weights = [0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS
        for kept, index_K, weights_K in zip(is_token, index_TK.tolist(), weights_TK.tolist(), strict=True):
            for expert, weight in zip(index_K, weights_K, strict=True):
                if kept and expert < NUM_EXPERTS:
                    slots[expert] += 1
                    weights[expert] += weight
        assert_close(token_scores[layer], torch.tensor(slots) / sum(slots), 1e-6)
        assert_close(gate_scores[layer], torch.tensor(weights) / 19, 1e-6)
        has_empty = ROUTERS[made.config.router_type].has_variable_top_k or made.config.num_zero_computation_experts
        assert (sum(slots) < 19 * index_TK.shape[1]) == bool(drops or has_empty)


def test_scoring_stops_and_leaves_the_model_as_it_was(caplog):
    model = small_moe("mixtral").train()
    model.model.layers[1].eval()
    assert score_experts(model, batches(padding=False), num_tokens=20).num_tokens == 24
    assert not caplog.text
    assert score_experts(model, batches(padding=False), num_tokens=100).num_tokens == 45
    assert "45 tokens, fewer than the 100" in caplog.text
    assert model.training
    assert not model.model.layers[1].mlp.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("layer", INTENT)
def test_selections_are_those_of_esft(layer):
    text, expected = INTENT[layer]
    scores = torch.tensor([float(value) for value in text.split()])
    assert select_experts(ExpertScores("token", {layer: scores}, 8192), top_p=0.2).experts == {layer: expected}


def test_selecting_everything_takes_only_what_was_used():
    scores = ExpertScores("token", {0: torch.tensor([0.1, 0.0, 0.7, 0.2], dtype=torch.float64)}, 10)
    assert select_experts(scores, top_p=1.0).experts == {0: [2, 3, 0]}
    assert select_experts(scores, top_p=0.7).experts == {0: [2]}
    assert select_experts(scores, top_p=0.71).experts == {0: [2, 3]}


def test_files_are_those_of_esft(tmp_path):
    text = '{"experts": {"1": [8, 26, 55], "10": [33]}, "shared_experts": true, "non_expert_modules": false}'
    path = tmp_path / "expert_cfg.json"
    path.write_text(text)
    selection = ExpertSelection.load(path)
    assert selection == ExpertSelection({1: [8, 26, 55], 10: [33]}, shared_experts=True)
    selection.save(path)
    assert json.loads(path.read_text()) == json.loads(text)


def test_ranks_for_lora_of_selected_experts():
    assert ExpertSelection({1: [3, 0]}).ranks(4, hot=8, cold=1) == {1: [8, 1, 1, 8]}
    with pytest.raises(ExpertLoraError, match="expert 99 in layer 0, but with num_experts=4"):
        ExpertSelection({0: [99, 1]}).ranks(4, hot=8)


def test_shares_of_gate_scores_do_not_depend_on_their_scale():
    scores = torch.tensor([0.1, 0.05, 0.7, 0.15])
    for scale in (0.38, 1.0, 2.5):
        assert select_experts(ExpertScores("gate", {0: scale * scores}, 10), top_p=0.8).experts == {0: [2, 3]}


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"experts": {"1": [8.7]}}',
        '{"experts": {"1": [1], "01": [2]}}',
        '{"experts": {}, "shared_experts": "false"}',
        '{"experts": {"a": [1]}}',
        '{"experts": [1]}',
        "not json",
        '{"layers": {}}',
    ],
)
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "expert_cfg.json"
    path.write_text(text)
    with pytest.raises(ExpertLoraError, match="is no selection of experts.*shared_experts"):
        ExpertSelection.load(path)


def test_what_is_refused():
    model = small_moe("mixtral")
    scores = ExpertScores("token", {0: torch.tensor([1.0])}, 1)
    for top_p in (0.0, 1.5):
        with pytest.raises(ExpertLoraError, match="more than 0 and at most 1"):
            select_experts(scores, top_p)
    with pytest.raises(ExpertLoraError, match="'token', 'gate'"):
        score_experts(model, batches(), kind="weight")
    for batch in (
        {"inputs_embeds": torch.zeros(1, 3, 32)},
        {"input_ids": ids(), "attention_mask": torch.ones(2, 1, 12, 12)},
    ):
        with pytest.raises(ExpertLoraError, match=r"A batch has .*Give `input_ids` \(batch, length\)"):
            score_experts(model, [batch])
    with pytest.raises(ExpertLoraError, match="A batch is a str. Give a DataLoader"):
        score_experts(model, ["a text"])
    with pytest.raises(ExpertLoraError, match="No token was seen"):
        score_experts(model, [])
    with pytest.raises(ExpertLoraError, match="Linear has no layer of experts"):
        score_experts(torch.nn.Linear(2, 2), batches())
