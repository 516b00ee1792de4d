# SPDX-License-Identifier: Apache-2.0
"""The callbacks under Trainer and TRL's trainers: what they log, steer, save and go on with, and what they refuse."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import trl
from conftest import assert_close, dense_model, moe_model, save_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from router_gradients import KINDS, rows, trainable
from safetensors.torch import load_file
from small_models import small_moe
from test_load_balancing import by_hand
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hf_moe import (
    BiasBalancer,
    BiasBalancingCallback,
    LoadBalancer,
    LoadBalancingCallback,
    RouterFreezeCallback,
    RouterReplayCallback,
    RouterStatisticsCallback,
    RoutingHistory,
    RoutingStatistics,
    add_moe_callbacks,
    load_router_bias,
)
from hf_moe.plots import plot_history
from hf_moe.training.router_hooks import RouterHooks
from hf_moe.training.routers import find_routers


def make_trainer(model, folder: Path, *callbacks, data=None, **arguments: Any) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        **arguments,
    }
    trainer = Trainer(
        model, TrainingArguments(str(folder), **arguments), train_dataset=data or rows(32), eval_dataset=rows(4)
    )
    add_moe_callbacks(trainer, *callbacks)
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def count_by_hand(model) -> dict[str, torch.Tensor]:
    """Per router a count of every expert, added to in each forward pass outside of evaluation; the first pass alone."""
    counts: dict[str, torch.Tensor] = {}

    def hook(name):
        def count(module, args, output):
            if module.training and torch._C._current_graph_task_id() == -1:
                mask = torch.stack([row["attention_mask"] for row in count.rows]).flatten().bool()
                chosen = torch.bincount(output[2][mask].flatten(), minlength=output[0].shape[-1])
                counts[name] = counts.get(name, 0) + chosen

        return count

    hooks = [hook(name) for name in find_routers(model)]
    for function, router in zip(hooks, find_routers(model).values(), strict=True):
        router.module.register_forward_hook(function)
    counts["rows"] = lambda given: [setattr(function, "rows", given) for function in hooks]
    return counts


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_statistics_are_exact(kind, use_reentrant, tmp_path):
    """With accumulation, padding, checkpointing and an evaluation in between."""
    model, data = trainable(kind), rows(16)
    counts = count_by_hand(model)
    set_rows, place = counts.pop("rows"), iter(range(0, 16, 2))

    def next_rows(module, args):
        if module.training:
            first = next(place)
            set_rows(data[first : first + 2])

    model.register_forward_pre_hook(next_rows)
    setting = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    callback = RouterStatisticsCallback(folder=str(tmp_path / "routing"))
    trainer = make_trainer(
        model,
        tmp_path,
        callback,
        data=data,
        gradient_accumulation_steps=2,
        gradient_checkpointing=use_reentrant is not None,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        **setting,
    )
    trainer.train()
    history = RoutingHistory.load(tmp_path / "routing")
    assert history.steps == [4]
    for name, layer in history.statistics[0].layers.items():
        assert layer.counts.tolist() == counts[name].tolist()
        assert layer.num_tokens == sum(int(row["attention_mask"].sum()) for row in data)
    by_hand = torch.stack(list(counts.values())).double()
    variation = by_hand.std(1, correction=0) / by_hand.mean(1)
    assert logged(trainer, "moe/load_cv") == pytest.approx([float(variation.mean())])
    assert logged(trainer, "moe/load_max_mean") == pytest.approx(
        [float((by_hand.max(1).values / by_hand.mean(1)).mean())]
    )
    assert {path.name for path in (tmp_path / "routing").iterdir()} >= {"load.png", "load_over_steps.png"}


def test_losses_in_the_log_are_those_computed_by_hand(tmp_path):
    """With padding and accumulation, the mean over micro-batches of the logged step and over layers."""
    model, data, outputs = trainable("mixtral"), rows(8), []
    for router in find_routers(model).values():
        router.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    trainer = make_trainer(
        model,
        tmp_path,
        RouterStatisticsCallback(),
        data=data,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.0,
    )
    trainer.train()
    found: dict[str, list[float]] = {"switch": [], "z": []}
    for place, (logits, weights, index) in list(enumerate(outputs))[6:]:  # of three layers two micro-batches
        first = 2 * (place // 3)
        mask = torch.stack([row["attention_mask"] for row in data[first : first + 2]])
        for kind, values in found.items():
            values.append(float(by_hand(kind, logits.detach(), index, weights, mask, sigmoid=False)))
    assert len(outputs) == 12
    assert logged(trainer, "moe/aux_loss") == pytest.approx([sum(found["switch"]) / 6], rel=1e-5)
    assert logged(trainer, "moe/z_loss") == pytest.approx([sum(found["z"]) / 6], rel=1e-5)


def test_layers_without_tokens_are_left_out(tmp_path):
    """As the experts for images where there were none: other processes, or other steps, had some."""
    callback = RouterStatisticsCallback(folder=tmp_path)
    model = trainable("mixtral")
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), is_world_process_zero=lambda: True)
    callback.begin(model, SimpleNamespace(hooks=lambda model: RouterHooks(model), trainer=trainer))
    first, second, _ = find_routers(model)
    for second_counts in ([4, 0, 0, 0] * 2 + [2, 0], [0] * 10):
        callback._counts = {first: torch.tensor([1] * 8 + [2, 0]), second: torch.tensor(second_counts)}
        callback._losses = {first: torch.tensor([1.5, 3.0, 1.0, 1.0]), second: torch.tensor([0.0, 0.0, 0.0, 0.0])}
        metrics = callback.metrics()
        assert metrics["moe/max_violation"] == (1.5 if any(second_counts) else 0)
        assert (metrics["moe/aux_loss"], metrics["moe/z_loss"]) == (1.5, 3.0)
    callback.end()
    history = RoutingHistory.load(tmp_path)
    assert [len(one.layers) for one in history.statistics] == [2, 1]
    assert RoutingStatistics.sum(history.statistics[::-1])[second].num_tokens == 2
    plot_history(history)  # which has a gap there


KEYS = ("load_max_mean", "load_cv", "max_violation", "entropy", "dead_frac", "aux_loss", "z_loss")


def test_keys_are_bounded(tmp_path):
    trainer = make_trainer(trainable("mixtral"), tmp_path, RouterStatisticsCallback())
    trainer.train()
    found = {key for entry in trainer.state.log_history for key in entry if key.startswith("moe/")}
    assert found == {f"moe/{key}" for key in KEYS}
    assert len(logged(trainer, "moe/entropy")) == 2
    trainer = make_trainer(trainable("mixtral"), tmp_path, RouterStatisticsCallback(per_layer=True))
    trainer.train()
    found = {key for entry in trainer.state.log_history for key in entry if key.startswith("moe/layer_")}
    assert found == {f"moe/layer_{layer}/{key}" for layer in range(3) for key in KEYS}


def test_tensorboard_has_the_keys(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        trainable("mixtral"),
        tmp_path,
        RouterStatisticsCallback(),
        LoadBalancingCallback("global_batch"),
        report_to=["tensorboard"],
    )
    trainer.train()
    (events,) = tmp_path.rglob("events.out*")
    reader = EventAccumulator(str(events)).Reload()
    for key in [*KEYS, "balance/global_batch"]:
        assert [event.value for event in reader.Scalars(f"train/moe/{key}")] == pytest.approx(
            logged(trainer, f"moe/{key}")
        )


STORE = """
import json, sys
from pathlib import Path
from router_gradients import trainable
from test_callbacks import make_trainer, logged
from hf_moe import RouterStatisticsCallback
callbacks = [RouterStatisticsCallback()]
arguments = {"report_to": ["trackio"], "project": "balance", "run_name": "one"}
trainer = make_trainer(trainable("mixtral"), Path(sys.argv[1]), *callbacks, **arguments)
trainer.train()
from trackio.sqlite_storage import SQLiteStorage
stored = [entry for entry in SQLiteStorage.get_logs("balance", "one") if "train/moe/entropy" in entry]
print(json.dumps([stored, trainer.state.log_history]))
"""


@pytest.mark.slow
@pytest.mark.processes
def test_trackio_has_the_keys(tmp_path):
    """In a process of its own, since trackio reads where to write when it is imported."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STORE, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    stored, history = json.loads(run.stdout.splitlines()[-1])
    assert len(stored) == 2
    for key in KEYS:
        expected = [entry[f"moe/{key}"] for entry in history if f"moe/{key}" in entry]
        assert [entry[f"train/moe/{key}"] for entry in stored] == pytest.approx(expected)


SUMMARY = """
import json, sys
from pathlib import Path
from router_gradients import trainable
from test_callbacks import make_trainer
from hf_moe import RouterStatisticsCallback
trainer = make_trainer(trainable("mixtral"), Path(sys.argv[1]), RouterStatisticsCallback(), report_to=["wandb"])
trainer.train()
import wandb
print(json.dumps([{key: wandb.run.summary[key] for key in wandb.run.summary.keys()}, trainer.state.log_history]))
wandb.finish()
"""


@pytest.mark.slow
@pytest.mark.processes
def test_wandb_has_the_keys(tmp_path):
    """In its file, and in its summary the last values."""
    path = os.pathsep.join([*sys.path, os.path.abspath(os.environ["HF_MOE_WANDB"])])
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SUMMARY, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    summary, history = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("[{")))
    (written,) = tmp_path.rglob("run-*.wandb")
    for key in KEYS:
        expected = [entry[f"moe/{key}"] for entry in history if f"moe/{key}" in entry]
        assert summary[f"train/moe/{key}"] == pytest.approx(expected[-1])
        assert f"train/moe/{key}".encode() in written.read_bytes()


class HostReads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, which is what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        self.number += func in waits
        return func(*args, **(kwargs or {}))


def test_the_device_is_asked_for_nothing_between_logs(tmp_path):
    """As without callbacks, but in the first step, in which a loss finds out what the scores are, and in those that log."""

    class Count(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.mode = HostReads()
            self.mode.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            self.mode.__exit__(None, None, None)
            reads.append(self.mode.number)

    found = []
    for callbacks in (
        [],
        [RouterStatisticsCallback(), LoadBalancingCallback("global_batch", adaptive=True), LoadBalancingCallback("z")],
    ):
        reads: list[int] = []
        trainer = make_trainer(trainable("mixtral"), tmp_path, *callbacks, max_steps=5, logging_steps=5)
        trainer.add_callback(Count())
        trainer.train()
        found.append(reads)
    assert found[0][1:4] == found[1][1:4]
    assert found[1][0] > found[0][0]  # so that the count is one of what it should be


def test_no_number_is_fetched_from_a_device(monkeypatch):
    """On a device without data every copy to the host is an error; what the scores are is found out before."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # not for this device
    model = trainable("deepseek_v3").to("meta")
    model.set_experts_implementation("batched_mm")
    hooks = RouterHooks(model)
    hooks._scores = dict.fromkeys(hooks.routers, "sigmoid")
    statistics = RouterStatisticsCallback()
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), is_world_process_zero=lambda: True)
    statistics.begin(model, SimpleNamespace(hooks=lambda model: hooks, trainer=trainer))
    balancers = [LoadBalancer(kind, **options).attach(hooks) for kind, options in KINDS.items()]
    balancers += [LoadBalancer("switch", adaptive=True).attach(hooks), BiasBalancer().attach(hooks)]
    input_ids = torch.zeros(2, 12, dtype=torch.long, device="meta")
    for _ in range(2):
        model(input_ids=input_ids).logits.sum().backward()
        for balancer in balancers:
            balancer.step()
        statistics._add_pending()
    assert {str(counts.device) for counts in statistics._counts.values()} == {"meta"}


def resumed(make, tmp_path: Path, **arguments: Any) -> tuple[Trainer, Trainer]:
    """A training of six steps, and one that goes on after three."""
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, **arguments}
    arguments["restore_callback_states_from_checkpoint"] = True
    whole = make(tmp_path / "whole", arguments)
    whole.train()
    other = make(tmp_path / "other", arguments)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    return whole, other


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_resumed_training_is_the_same(is_adapter, tmp_path):
    def make(folder: Path, arguments: dict[str, Any]) -> Trainer:
        model = trainable("deepseek_v3")
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # which the Trainer does not load again for this class
                parameter.requires_grad_(False)
        if is_adapter:
            torch.manual_seed(0)
            model = get_peft_model(small_moe("deepseek_v3"), LoraConfig(r=2, target_modules=["kv_b_proj"]))
        callbacks = [
            BiasBalancingCallback(0.01),
            LoadBalancingCallback("global_batch", adaptive=True, warmup_steps=4),
            LoadBalancingCallback("z", 0.1),
            RouterStatisticsCallback(folder=str(folder / "routing")),
        ]
        return make_trainer(model, folder, *callbacks, **arguments)

    whole, other = resumed(make, tmp_path, gradient_accumulation_steps=2)
    for key in ("moe/load_cv", "moe/z_loss", "moe/aux_loss", *([] if is_adapter else ["moe/balance/global_batch"])):
        assert len(logged(whole, key)) == 3
        assert logged(other, key) == pytest.approx(logged(whole, key), abs=1e-5), key
    ours = [[callback.state() for callback in trainer.callback_handler.callbacks[-4:]] for trainer in (whole, other)]
    assert ours[0][0] == ours[1][0]  # the bias
    assert ours[0][1]["state"]["num_steps"] == ours[1][1]["state"]["num_steps"] == 6
    for key in ("window", "coefs"):
        assert ours[0][1]["state"][key].keys() == ours[1][1]["state"][key].keys()
        for name, values in ours[0][1]["state"][key].items():
            assert values == pytest.approx(ours[1][1]["state"][key][name], rel=1e-6)
    biases = [
        {name: router.module.e_score_correction_bias for name, router in find_routers(trainer.model).items()}
        for trainer in (whole, other)
    ]
    for name, bias in biases[0].items():
        assert torch.equal(bias, biases[1][name])
        assert bias.abs().max() > 0.02


def test_what_begins_anew_says_so(tmp_path, caplog):
    def make(folder: Path, **arguments: Any) -> Trainer:
        return make_trainer(trainable("mixtral"), folder, LoadBalancingCallback("switch"), **arguments)

    make(tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with caplog.at_level("WARNING"):
        make(tmp_path).train(resume_from_checkpoint=checkpoint)
        assert "LoadBalancingCallback begins anew at step 2: set `restore_callback_states" in caplog.text
        path = Path(checkpoint, "trainer_state.json")
        state = json.loads(path.read_text())
        state["stateful_callbacks"]["LoadBalancingCallback"]["world_size"] = 8
        path.write_text(json.dumps(state))
        make(tmp_path, restore_callback_states_from_checkpoint=True).train(resume_from_checkpoint=checkpoint)
        assert "the checkpoint was saved by 8 processes, and 1 go on" in caplog.text


def test_the_options_given_on_resuming_count(tmp_path, caplog):
    """And not those of the checkpoint, of which a Trainer makes callbacks anew."""

    def make(folder: str, *callbacks, **arguments: Any) -> Trainer:
        statistics = RouterStatisticsCallback(folder=tmp_path / folder)
        return make_trainer(
            trainable("deepseek_v3"),
            tmp_path,
            *callbacks,
            statistics,
            save_strategy="steps",
            save_steps=2,
            **arguments,
        )

    make(
        "first", LoadBalancingCallback("switch", 0.01), LoadBalancingCallback("z"), BiasBalancingCallback(0.1)
    ).train()
    lines = (tmp_path / "first" / "routing_history.jsonl").read_text()
    callbacks = [LoadBalancingCallback("switch", 0.5), LoadBalancingCallback("entropy"), BiasBalancingCallback(0.3)]
    trainer = make("second", *callbacks, restore_callback_states_from_checkpoint=True)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    running = trainer.callback_handler.callbacks
    switch, entropy = (callback for callback in running if isinstance(callback, LoadBalancingCallback))
    (bias,) = (callback for callback in running if isinstance(callback, BiasBalancingCallback))
    assert (switch.balancer.base_coef, switch.balancer.num_steps) == (0.5, 4)
    assert (entropy.balancer.kind, entropy.balancer.num_steps) == ("entropy", 2)  # its own
    assert bias.balancer.update_rate == 0.3
    assert (
        "LoadBalancingCallback goes on with other options than the checkpoint was saved with: {'coef': 0.5}"
        in caplog.text
    )
    assert "saved without LoadBalancingCallback of kind 'entropy', which begins anew" in caplog.text
    assert (tmp_path / "first" / "routing_history.jsonl").read_text() == lines
    assert len((tmp_path / "second" / "routing_history.jsonl").read_text().splitlines()) == 1
    # Once more with what the callbacks of the first training were.
    caplog.clear()
    trainer = make(
        "first",
        LoadBalancingCallback("switch", 0.01),
        LoadBalancingCallback("z"),
        BiasBalancingCallback(0.1),
        restore_callback_states_from_checkpoint=True,
    )
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "other options" not in caplog.text


@pytest.mark.parametrize(
    ("saved", "given", "num_steps"),
    [
        (["switch"], ["switch", "z"], [4, 2]),
        (["switch"], ["z", "switch"], [2, 4]),
        (["switch", "z", "entropy"], ["switch", "entropy"], [4, 4]),
        (["switch", "z"], ["z", "switch"], [4, 4]),
        (["switch", "z"], ["switch"], [4]),
    ],
)
def test_a_callback_goes_on_with_the_state_of_its_kind(saved, given, num_steps, tmp_path, caplog):
    def make(kinds: list[str], **arguments: Any) -> Trainer:
        callbacks = [LoadBalancingCallback(kind) for kind in kinds]
        return make_trainer(trainable("mixtral"), tmp_path, *callbacks, **arguments)

    make(saved, save_strategy="steps", save_steps=2).train()
    trainer = make(given[:-1], restore_callback_states_from_checkpoint=True)
    trainer.add_callback(LoadBalancingCallback(given[-1]))  # after add_moe_callbacks
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    balancers = [of.balancer for of in trainer.callback_handler.callbacks if isinstance(of, LoadBalancingCallback)]
    assert [(balancer.kind, balancer.num_steps) for balancer in balancers] == list(zip(given, num_steps, strict=True))
    assert ("saved without LoadBalancingCallback" in caplog.text) == (2 in num_steps)


def test_what_a_trainer_has_already_is_refused(tmp_path):
    trainer = make_trainer(trainable("mixtral"), tmp_path, LoadBalancingCallback("switch"), RouterStatisticsCallback())
    with pytest.raises(ValueError, match="has a LoadBalancingCallback of kind 'switch' already, and with two of them"):
        add_moe_callbacks(trainer, LoadBalancingCallback("switch", 0.1))
    with pytest.raises(ValueError, match="has a RouterStatisticsCallback already"):
        add_moe_callbacks(trainer, RouterStatisticsCallback())
    add_moe_callbacks(trainer, LoadBalancingCallback("z"))
    with pytest.raises(ValueError, match="The first argument is the trainer, and MixtralForCausalLM is none"):
        add_moe_callbacks(trainer.model, LoadBalancingCallback())


def test_experts_that_a_trainer_does_not_load_again_are_said(tmp_path, caplog):
    make_trainer(
        trainable("mixtral"), tmp_path, RouterStatisticsCallback(), save_strategy="steps", save_steps=2
    ).train()
    with caplog.at_level("WARNING"):
        trainer = make_trainer(trainable("mixtral"), tmp_path, RouterStatisticsCallback())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "THE TRAINED EXPERTS AND ROUTERS ARE NOT LOADED" in caplog.text


def test_the_bias_of_an_adapter(tmp_path):
    model = get_peft_model(small_moe("deepseek_v3"), LoraConfig(r=2, target_modules=["kv_b_proj"]))
    trainer = make_trainer(model, tmp_path, BiasBalancingCallback(0.01), save_strategy="steps", save_steps=4)
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        fresh = small_moe("deepseek_v3")
        load_router_bias(fresh, folder)
        for name, router in find_routers(fresh).items():
            trained = model.get_submodule(f"base_model.model.{name}").e_score_correction_bias
            assert torch.equal(router.module.e_score_correction_bias, trained)
    trainer.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "router_bias.safetensors").keys() == find_routers(fresh).keys()
    loaded = PeftModel.from_pretrained(small_moe("deepseek_v3"), tmp_path / "checkpoint-4")
    load_router_bias(loaded, tmp_path)
    with pytest.raises(ValueError, match="The routers of .* are not those of this DeepseekV3ForCausalLM"):
        load_router_bias(small_moe("deepseek_v3", num_hidden_layers=2), tmp_path)
    with pytest.raises(ValueError, match=r"There is no .*router_bias.safetensors. A BiasBalancingCallback writes"):
        load_router_bias(small_moe("deepseek_v3"), tmp_path / "gone")


class Watch(transformers.TrainerCallback):
    """What changes in every step."""

    def __init__(self, model):
        self.model, self.changed = model, []
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, **kwargs):
        now = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        changed = {name for name, value in now.items() if not torch.equal(value, self.before[name])}
        is_router = {"mlp.gate.weight" in name for name in changed}
        self.changed.append({(True,): "routers", (False,): "others", (False, True): "all"}[tuple(sorted(is_router))])
        self.before = now


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["others"] * 6),
        ({"freeze_from": 2, "freeze_until": 4}, ["all", "all", "others", "others", "all", "all"]),
        ({"only_routers_until": 2}, ["routers"] * 2 + ["all"] * 4),
        ({"only_routers_until": 2, "freeze_from": 4}, ["routers", "routers", "all", "all", "others", "others"]),
    ],
)
def test_schedules_of_freezing(options, expected, tmp_path):
    model = trainable("mixtral")
    watch = Watch(model)
    trainer = make_trainer(model, tmp_path, RouterFreezeCallback(**options), max_steps=6)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.changed == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterFreezeCallback(freeze_from=3, freeze_until=3), "freeze_until is 3 and freeze_from 3"),
        (lambda: RouterFreezeCallback(1, only_routers_until=2), "only_routers_until is 2, but the routers are frozen"),
        (lambda: LoadBalancingCallback("gshard"), "kind is 'gshard'"),
        (lambda: BiasBalancingCallback(0), "update_rate is 0"),
    ],
)
def test_values_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_trainers_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM declares no router"):
        make_trainer(dense_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="is no callback of hf_moe. Give instances"):
        make_trainer(trainable("mixtral"), tmp_path, LoadBalancingCallback)
    trainer = make_trainer(trainable("mixtral"), tmp_path, BiasBalancingCallback())
    with pytest.raises(
        ValueError, match="MixtralTopKRouter.* have no bias to choose experts with.*LoadBalancingCallback"
    ):
        trainer.train()
    model = trainable("mixtral")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[LoadBalancingCallback()])
    with pytest.raises(
        ValueError, match="LoadBalancingCallback does not know its trainer. Give it with `add_moe_callbacks"
    ):
        trainer.train()
    frozen = get_peft_model(small_moe("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="The routers have no parameter that trains"):
        make_trainer(frozen, tmp_path, RouterFreezeCallback()).train()


def test_callbacks_given_to_the_trainer_work_once_it_is_attached(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], logging_steps=1)
    trainer = Trainer(trainable("mixtral"), arguments, train_dataset=rows(), callbacks=[RouterStatisticsCallback()])
    add_moe_callbacks(trainer)
    trainer.train()
    assert logged(trainer, "moe/entropy")


def test_two_trainers_of_one_model(tmp_path):
    """Each callback knows its own, also while the other is alive."""
    model, trainers = trainable("mixtral"), []
    for steps in (4, 1):
        callback = LoadBalancingCallback()
        trainers.append(make_trainer(model, tmp_path, callback, max_steps=1, gradient_accumulation_steps=steps))
    for trainer in (*trainers, *trainers[::-1]):
        trainer.train()
        callback = trainer.callback_handler.callbacks[-1]
        assert callback.attachment.trainer is trainer


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_training_leaves_nothing(tmp_path):
    model = trainable("mixtral")
    callbacks = [LoadBalancingCallback("switch"), RouterStatisticsCallback(), RouterReplayCallback()]
    trainer = make_trainer(model, tmp_path, *callbacks, RouterFreezeCallback(only_routers_until=5))
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    trainer.callback_handler.callbacks.pop()
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_second_training_begins_anew(tmp_path):
    callbacks = [LoadBalancingCallback("switch", warmup_steps=2), BiasBalancingCallback()]
    trainer = make_trainer(trainable("deepseek_v3"), tmp_path, *callbacks)
    for _ in range(2):
        trainer.train()
        assert callbacks[0].balancer.num_steps == 4
    first = callbacks[1].save_state()
    trainer.model.get_submodule(next(iter(first))).e_score_correction_bias.fill_(7.0)
    trainer.train()
    assert callbacks[1].save_state()[next(iter(first))] == pytest.approx([7.0] * 4, abs=0.1)


def test_checkpoints_do_not_grow(tmp_path):
    callbacks = [LoadBalancingCallback("switch"), LoadBalancingCallback("z")]
    make_trainer(trainable("mixtral"), tmp_path, *callbacks, save_strategy="steps", save_steps=1).train()
    for step in range(1, 5):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert [one["state"]["num_steps"] for one in state["stateful_callbacks"]["LoadBalancingCallback"]] == [
            step,
            step,
        ]


def test_the_bias_beside_the_best_adapter(tmp_path):
    """The first checkpoint is the best, since the learning rate is far too high."""
    model = get_peft_model(small_moe("deepseek_v3"), LoraConfig(r=2, target_modules=["kv_b_proj"]))
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 3.0,
    }
    trainer = make_trainer(model, tmp_path, BiasBalancingCallback(0.01), load_best_model_at_end=True, **arguments)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    assert (tmp_path / "router_bias.safetensors").read_bytes() == (best / "router_bias.safetensors").read_bytes()
    for name, bias in load_file(best / "router_bias.safetensors").items():
        assert torch.equal(model.get_submodule(f"base_model.model.{name}").e_score_correction_bias, bias)


def test_a_history_is_not_overwritten(tmp_path):
    for step in range(2):
        trainer = make_trainer(trainable("mixtral"), tmp_path / "out", RouterStatisticsCallback(folder=str(tmp_path)))
        if not step:
            trainer.train()
    with pytest.raises(ValueError, match=r"routing_history.jsonl is there already, from another training"):
        trainer.train()


def test_logits_that_are_not_finite_are_said(tmp_path, caplog):
    model = trainable("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = float("nan")
    with caplog.at_level("WARNING"):
        make_trainer(model, tmp_path, RouterStatisticsCallback(), max_steps=1, logging_steps=1).train()
    assert "Before step 1 the logits of model.layers.1.mlp.gate and 1 other routers were NaN" in caplog.text


def test_the_models_own_loss_is_said(tmp_path, caplog):
    model = trainable("mixtral", output_router_logits=True)
    with caplog.at_level("WARNING"):
        make_trainer(model, tmp_path, LoadBalancingCallback(), max_steps=1).train()
    assert "The model's own balance loss is on as well" in caplog.text


def language_data() -> dict[str, Dataset]:
    texts = ["the quick brown fox", "jumps over the lazy dog"] * 4
    return {
        "sft": Dataset.from_dict({"text": texts}),
        "dpo": Dataset.from_dict({"prompt": ["say "] * 8, "chosen": texts, "rejected": texts[::-1]}),
        "grpo": Dataset.from_dict({"prompt": texts}),
    }


def trl_trainer(name: str, tmp_path: Path, settings: dict[str, Any] | None = None, **options: Any) -> Trainer:
    moe_model("llama").save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    arguments = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    arguments |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}
    if name == "grpo":
        arguments |= {"num_generations": 2, "max_completion_length": 4}
    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}[name]
    trainer = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}[name]
    if name == "grpo":
        options["reward_funcs"] = lambda completions, **kwargs: [float(len(text)) for text in completions]
    return trainer(
        model=model,
        args=config(str(tmp_path / "out"), router_aux_loss_coef=0.0, **arguments | (settings or {})),
        **{"train_dataset": language_data()[name], "processing_class": tokenizer, **options},
    )


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_trl(name, is_adapter, tmp_path, caplog):
    """With a coefficient the routers become other than without: the trainings are the same in all else."""
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    weights = []
    for coef in (0.0, 10.0):
        trainer = trl_trainer(name, tmp_path, **({"peft_config": peft_config} if is_adapter else {}))
        add_moe_callbacks(
            trainer,
            LoadBalancingCallback("switch", coef, grad_to="router"),
            RouterStatisticsCallback(),
            RouterReplayCallback(),
        )
        with caplog.at_level("WARNING"):
            trainer.train()
        weights.append([router.module.weight.detach().clone() for router in find_routers(trainer.model).values()])
        assert len(logged(trainer, "moe/balance/switch")) == (2 if coef else 0)
        assert len(logged(trainer, "moe/entropy")) == 2
    assert "own balance loss" not in caplog.text
    changed = [not torch.equal(*pair) for pair in zip(*weights, strict=True)]
    assert any(changed) if is_adapter else all(changed)  # an adapter has the routers it was made from besides


class TakeGradients(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        routers = find_routers(model).values()
        self.gradients = torch.stack([router.module.weight.grad.detach().clone() for router in routers])


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "padding_free": True, "max_length": None},
        {"gradient_accumulation_steps": 2, "loss_type": "dft"},
    ],
)
def test_the_same_gradient_in_every_setting_of_trl(setting, tmp_path):
    """All texts are alike, so that the number of micro-batches does not matter."""

    def added(settings: dict[str, Any]) -> torch.Tensor:
        gradients = []
        for coef in (0.0, 1.0):
            texts = Dataset.from_dict({"text": ["jumps over the lazy dog"] * 16})
            settings = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 1, **settings}
            trainer = trl_trainer("sft", tmp_path, settings, train_dataset=texts)
            add_moe_callbacks(trainer, LoadBalancingCallback("switch", coef))
            trainer.add_callback(take := TakeGradients())
            trainer.train()
            gradients.append(take.gradients)
        return gradients[1] - gradients[0]

    expected = added({})
    assert expected.norm() > 0.1
    assert_close(added(setting), expected, 1e-5)


def test_reinforcement_learning_has_no_balance_loss_by_default(tmp_path, caplog):
    trainer = trl_trainer("grpo", tmp_path)
    add_moe_callbacks(trainer, LoadBalancingCallback(), RouterStatisticsCallback())
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "no balance loss with GRPOTrainer, where it is known to spoil" in caplog.text
    assert not logged(trainer, "moe/balance/switch")
    assert logged(trainer, "moe/entropy")


def test_reinforcement_learning_with_a_coefficient(tmp_path):
    trainer = trl_trainer("grpo", tmp_path)
    add_moe_callbacks(trainer, LoadBalancingCallback(coef=0.1))
    trainer.train()
    assert len(logged(trainer, "moe/balance/switch")) == 2
