# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench lora` on tiny layers: the layers compute alike, and what is counted is what is there."""

import json

import pytest
import torch
from conftest import assert_close

from hf_moe.cli.bench_lora import FROZEN, OURS, PEFT, SHAPES, Step, make_layers, multiplications, saved_bytes


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_compute_alike(name, checkpointing):
    layers = make_layers(SHAPES[name], 1 / 128, 4, torch.float32, "cpu")
    step = Step(SHAPES[name], layers[FROZEN], 6, checkpointing)
    assert_close(step.forward(layers[OURS]), step.forward(layers[PEFT]))
    assert (step.forward(layers[OURS]) - step.forward(layers[FROZEN])).abs().max() > 1e-6
    for layer in layers.values():
        step(layer)
    weights = {parameter.data_ptr() for parameter in layers[FROZEN].parameters()}
    for layer in layers.values():
        assert {p.data_ptr() for n, p in layer.named_parameters() if "lora" not in n} == weights


def test_what_is_counted():
    layers = make_layers(SHAPES["mixtral-8x7b"], 1 / 128, 4, torch.float32, "cpu")
    step = Step(SHAPES["mixtral-8x7b"], layers[FROZEN], 6, checkpointing=False)
    hidden, intermediate, rank = 32, 112, 4
    weights = 3 * hidden * intermediate
    factors = rank * (hidden + 2 * intermediate) + rank * (intermediate + hidden)
    assert multiplications(layers[FROZEN], FROZEN) == 2 * weights
    assert multiplications(layers[OURS], OURS) == 2 * weights + 3 * factors
    assert multiplications(layers[PEFT], PEFT) == 3 * weights
    assert saved_bytes(layers[PEFT], step) > 8 * weights * 4  # the weights of all experts, with the adapter
    assert saved_bytes(layers[OURS], step) < 8 * weights


@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
def test_the_command(run_command, more):
    arguments = ["--shape", "gpt-oss-20b", "--scale", "0.01", "--tokens", "256", "--rank", "2", "--runs", "1"]
    run = run_command("bench", "lora", *arguments, *more, "--json")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout[: run.stdout.rindex("]") + 1])
    assert [row["experts"] for row in rows] == [FROZEN, OURS, PEFT]
    for row in rows:
        assert row["median_ms"] > 0
        assert row["peak_mib"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-5"], "no shape 'gpt-5'. Choose from qwen3-30b-a3b"),
        (["--tokens", "-3"], "--tokens is -3"),
        (["--runs", "0"], "--runs is 0"),
        (["--scale", "0"], "--scale is 0"),
        (["--dtype", "int8"], "Choose float32 or bfloat16"),
    ],
)
def test_what_is_refused(run_command, arguments, message):
    run = run_command("bench", "lora", *arguments)
    assert run.returncode == 1
    assert message in run.stderr
