# SPDX-License-Identifier: Apache-2.0
"""Two processes with DDP or FSDP2 train expert LoRA as PEFT alone does in one, and ESFT's experts as one process does."""

import os
import re
import subprocess
import sys

import distributed_lora
import pytest
import torch
from distributed_lora import ESFT, RANKS, ROWS, model_of, train, train_with_trainer, trained_parts


def assert_same_training(states: list[distributed_lora.State], expected: distributed_lora.State, way: str) -> None:
    """The mean loss of the processes, and what each of them trained."""
    losses = torch.tensor([losses for losses, _ in states]).mean(dim=0)
    assert losses == pytest.approx(expected[0], abs=1e-5), way
    for _, trained in states:
        assert trained.keys() == expected[1].keys()
        for name, part in trained.items():
            assert (part - expected[1][name]).abs().max() < 1e-5, (way, name)


@pytest.mark.processes
def test_two_processes_train_as_one(tmp_path):
    base = model_of("mixtral")
    base.save_pretrained(tmp_path / "adapter")
    base.unload().save_pretrained(tmp_path / "base")
    command = [sys.executable, distributed_lora.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, rank], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    expected = {kind: train(model_of(kind)) for kind in (*RANKS, ESFT)}
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors

    results, of_trainer, refusals = zip(
        *(torch.load(tmp_path / f"results{rank}.pt") for rank in range(2)), strict=True
    )
    assert len(results[0]) == 2 * (3 * 5 + 2) + 1
    for kind, way in results[0]:
        assert_same_training([of_rank[kind, way] for of_rank in results], expected[kind], way)
    for kind, (_, trained) in expected.items():
        start = trained_parts(model_of(kind))
        assert min((part - start[name]).abs().max() for name, part in trained.items()) > 1e-2
    assert_same_training(of_trainer, train_with_trainer(model_of("mixtral"), str(tmp_path), ROWS), "Trainer")

    for of_rank in refusals:
        disabled, enabled, expert_parallel = of_rank
        assert "has been made a FSDPParamWrapper" in disabled
        assert "has been made a FSDPParamWrapper" in enabled
        # Before 5.23 transformers leaves PEFT to find out, which does when it loads the adapter.
        assert re.search("holds 2 experts of those that are split over processes|size mismatch", expert_parallel)
