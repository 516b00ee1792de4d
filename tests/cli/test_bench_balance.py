# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench balance`: trainings that take turns, and an error of one of them."""

import json
import multiprocessing
import queue

import pytest

from hf_moe.cli import bench_balance


@pytest.mark.slow
@pytest.mark.processes
def test_trainings_take_turns(run_command):
    sizes = ["--layers", 1, "--experts", 4, "--hidden", 64, "--tokens", 128, "--interval", 2, "--runs", 1]
    run = run_command("bench", "balance", *sizes, "--json")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert [row["callbacks"] for row in rows] == list(bench_balance.make_variants())
    assert rows[0]["times_nothing"] == 1
    assert all(row["step_ms"] > 0 for row in rows)


def test_a_mean_of_medians():
    """Two intervals of three steps are counted, and the first is not; one step was disturbed."""
    seconds = [9.0, 9.0, 9.0, 1.0, 1.0, 4.0, 1.0, 70.0, 6.0]
    assert bench_balance.split(seconds, 3) == (1.0, 5.0)
    assert bench_balance.mean_step(seconds, 3) == (2 * 1.0 + 5.0) / 3
    assert bench_balance.split([9.0, 2.0, 4.0], 1) == (3.0, 3.0)


@pytest.mark.processes
def test_an_error_of_one_training_ends_all():
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=int, args=("no number",))
    process.start()
    process.join()
    with pytest.raises(RuntimeError, match="One of the trainings ended with an error"):
        bench_balance._next(queue.Queue(), [process])
