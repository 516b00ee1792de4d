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
    assert rows[0]["times_nothing"] == rows[0]["highest"] == 1
    assert all(row["median_ms"] > 0 for row in rows)


@pytest.mark.processes
def test_an_error_of_one_training_ends_all():
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=int, args=("no number",))
    process.start()
    process.join()
    with pytest.raises(RuntimeError, match="One of the trainings ended with an error"):
        bench_balance._next(queue.Queue(), [process])
