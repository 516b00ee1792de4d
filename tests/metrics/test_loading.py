# SPDX-License-Identifier: Apache-2.0
"""The metrics load and compute in a fresh process without a network, and say what they are."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import pytest

import hf_moe
from hf_moe.metrics import METRICS, metric_path


OFFLINE = """
import socket
class Blocked(socket.socket):
    def connect(self, *arguments):
        raise AssertionError(f"a connection to {arguments}")
socket.socket = Blocked
from pathlib import Path
import evaluate, torch, hf_moe
from hf_moe.training.statistics import LayerRouting, RoutingStatistics
statistics = RoutingStatistics({"gate": LayerRouting(torch.tensor([1, 3]), 2)})
choices = {"gate": torch.tensor([[0], [1]])}
inputs = {
    "expert_load": {"predictions": statistics},
    "expert_specialization": {"predictions": {"a": statistics, "b": statistics}},
    "router_agreement": {"predictions": choices, "references": choices},
}
for name, arguments in inputs.items():
    path = Path(hf_moe.__file__).parent / "metrics" / name
    print(sorted(evaluate.load(str(path)).compute(**arguments)))
"""


@pytest.mark.processes
def test_offline_in_a_fresh_process(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "['coefficient_of_variation', 'dead_fraction', 'entropy', 'layers', 'max_violation']",
        "['bias', 'layers', 'mutual_information', 'specialization', 'top_experts']",
        "['exact', 'first_choice', 'layers', 'overlap']",
    ]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name):
    metric = evaluate.load(metric_path(name))
    assert metric.name == name
    assert isinstance(metric.features, datasets.Features)
    assert all(url.startswith("https://huggingface.co/papers/") for url in metric.info.reference_urls)
    for text in (metric.description, metric.citation, metric.inputs_description):
        assert text.strip()
    assert f'metric_path("{name}")' in metric.inputs_description
    assert metric.inputs_description in metric.compute.__doc__


def test_every_folder_is_a_metric():
    folder = Path(hf_moe.__file__).parent / "metrics"
    assert {path.stem for path in folder.glob("*/*.py")} == set(METRICS)
    with pytest.raises(ValueError, match="no metric 'load'. Metrics are expert_load, expert_specialization"):
        hf_moe.metric_path("load")
