# SPDX-License-Identifier: Apache-2.0
"""Recorder, statistics, callback and balance losses on models with every router of hf_moe, beside what the blocks got."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from transformers import Trainer, TrainingArguments

from hf_moe import RouterStatisticsCallback, RoutingRecorder, add_moe_callbacks
from hf_moe.models.routers import ROUTERS
from hf_moe.training.statistics import LayerRouting


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, NUM_EXPERTS, build_model, with_routing_inputs


@pytest.fixture(params=ALL_CASES)
def case(request) -> str:
    return request.param


def run_and_watch(made, batch) -> tuple[dict[str, LayerRouting], list[torch.Tensor], torch.Tensor]:
    """Statistics, and by layer the choices that reached the experts, seen where the block hands them on."""
    seen = []

    def watch(block):
        original = block._run_experts

        def run_experts(states, index_TK, weights_TK):
            seen.append(index_TK)
            return original(states, index_TK, weights_TK)

        block._run_experts = run_experts

    for layer in made.model.layers:
        watch(layer.mlp)
    with RoutingRecorder(made) as recorder:
        made(**with_routing_inputs(batch, made))
    return recorder.statistics().layers, seen, batch["attention_mask"].bool().flatten()


@pytest.mark.parametrize("is_training", [False, True])
def test_the_recorder_counts_what_reaches_the_experts(case, is_training, batch):
    made = build_model(case).train(is_training)
    layers, seen, is_token_T = run_and_watch(made, batch)
    num_zero = made.config.num_zero_computation_experts
    for layer, index_TK in zip(layers.values(), seen, strict=True):
        served = index_TK[is_token_T]
        served = served[served < NUM_EXPERTS + num_zero]
        assert torch.equal(layer.counts, torch.bincount(served, minlength=NUM_EXPERTS + num_zero))
        assert layer.num_tokens == is_token_T.sum() == 19
        assert layer.experts_per_token == pytest.approx(len(served) / 19)
        assert layer.num_zero_computation_experts == num_zero
        assert layer.zero_computation_fraction == pytest.approx((served >= NUM_EXPERTS).float().mean().item())
        if not ROUTERS[made.config.router_type].has_variable_top_k:
            wanted = 19 * made.config.num_experts_per_tok
            assert layer.num_dropped == wanted - len(served)
            assert layer.dropped_fraction == pytest.approx(1 - len(served) / wanted)
            assert is_training or layer.num_dropped == 0
    if is_training and "capacity" in case:
        assert sum(layer.num_dropped for layer in layers.values()) > 0


@pytest.mark.parametrize("policy", ["position", "recycle"])
def test_the_load_is_what_the_router_wants(policy, batch):
    """A capacity that leaves every expert two slots makes even what is served, and not what is wanted."""
    values = {"capacity_policy": policy, "capacity_factor": 0.01, "min_capacity": 2}
    made, wanted = build_model("capacity by position", **values).train(), []
    is_token_T = batch["attention_mask"].bool().flatten()
    for layer in made.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: wanted.append(output[2][is_token_T]))
    with RoutingRecorder(made) as recorder:
        made(**with_routing_inputs(batch, made))
    for layer, index_TK in zip(recorder.statistics().layers.values(), wanted, strict=True):
        demand = torch.bincount(index_TK.flatten(), minlength=NUM_EXPERTS).double()
        assert layer.demand.tolist() == demand.tolist()
        assert layer.counts.max() == 2
        assert layer.num_dropped == 38 - layer.counts.sum()
        assert layer.max_violation == pytest.approx((demand.max() / demand.mean() - 1).item())
        assert layer.coefficient_of_variation == pytest.approx((demand.std(correction=0) / demand.mean()).item())
        assert layer.entropy == pytest.approx(torch.distributions.Categorical(demand).entropy().item() / math.log(8))
        assert layer.dead_experts == [expert for expert in range(8) if not demand[expert]]


def test_dropped_slots_add_up_over_texts_and_survive_a_file(batch, tmp_path):
    made = build_model("capacity by position").train()
    with RoutingRecorder(made) as recorder:
        made(**with_routing_inputs(batch, made))
        once = recorder.statistics()
        made(**with_routing_inputs(batch, made))
    twice = recorder.statistics()
    assert once.summary()["dropped_fraction"] > 0
    together = type(once).sum([once, once])
    again = type(once).from_dict(twice.to_dict())
    for name, layer in twice.layers.items():
        for other in (together[name], again[name]):
            assert torch.equal(other.counts, layer.counts)
            assert torch.equal(other.demand, layer.demand)
            assert (other.num_dropped, other.num_tokens) == (layer.num_dropped, layer.num_tokens)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_drops_nothing_twice(use_reentrant, batch):
    numbers = []
    for checkpointing in (False, True):
        made = build_model("capacity by position").train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with RoutingRecorder(made) as recorder:
            made(**with_routing_inputs(batch, made)).loss.backward()
        numbers.append(recorder.statistics().summary())
    assert_close(torch.tensor([*numbers[0].values()]), torch.tensor([*numbers[1].values()]), 0.0)


@pytest.mark.parametrize(
    "name", ["capacity by position", "top_p", "zero-computation experts", "modality", "sigmoid_topk"]
)
def test_the_callback_logs_what_there_is(name, batch, tmp_path, caplog):
    """Under a Trainer, with the counts of the recorder."""
    made = build_model(name, eval_capacity_factor=None).train()
    trainer = Trainer(
        made,
        TrainingArguments(
            str(tmp_path), max_steps=1, logging_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, learning_rate=0.0,
        ),
        train_dataset=[{key: value[row] for key, value in batch.items()} for row in range(2)],
    )  # fmt: skip
    add_moe_callbacks(trainer, RouterStatisticsCallback(per_layer=True))
    with RoutingRecorder(made) as recorder:
        trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "moe/entropy" in entry)
    summary = recorder.statistics().summary()
    has = {
        "moe/dropped_frac": "capacity" in name,
        "moe/zero_computation_frac": "zero" in name,
        "moe/experts_per_token": name in ("capacity by position", "top_p"),
    }
    for key, is_there in has.items():
        assert (key in entry) == is_there, key
        if is_there:
            of_recorder = key.removeprefix("moe/").replace("_frac", "_fraction")
            assert entry[key] == pytest.approx(summary[of_recorder], rel=1e-5)
    assert entry["moe/entropy"] == pytest.approx(summary["entropy"], rel=1e-5)
    assert "NaN" not in caplog.text
