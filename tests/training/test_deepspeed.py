# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed divides the loss by the accumulation steps in a place of its own; the balance loss has to be right there too."""

import os
import subprocess
import sys

import deepspeed_balance
import pytest
import torch
from conftest import assert_close
from router_gradients import rows
from test_load_balancing import expected_gradient


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_under_deepspeed(stage, tmp_path):
    path = os.pathsep.join([*sys.path, os.environ["HF_MOE_DEEPSPEED"]])
    command = [sys.executable, deepspeed_balance.__file__, str(tmp_path), str(stage)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    expected, _ = expected_gradient("switch", "mixtral", rows(8))
    assert_close(torch.load(tmp_path / "gradient.pt"), expected, 2e-6)
