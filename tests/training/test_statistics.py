# SPDX-License-Identifier: Apache-2.0
"""The statistics in closed form."""

import json
import math

import pytest
import torch

from hf_moe.training.statistics import LayerRouting, RoutingStatistics


def test_balanced_layer():
    layer = LayerRouting(torch.tensor([5, 5, 5, 5]), 10)
    assert layer.load.tolist() == [0.25] * 4
    assert layer.entropy == pytest.approx(1.0)
    assert layer.max_violation == pytest.approx(0.0)
    assert layer.coefficient_of_variation == pytest.approx(0.0)
    assert layer.dead_experts == []


def test_collapsed_layer():
    layer = LayerRouting(torch.tensor([0, 12, 0, 0]), 12)
    assert layer.entropy == 0.0
    assert layer.max_violation == pytest.approx(3.0)
    assert layer.coefficient_of_variation == pytest.approx(math.sqrt(3))
    assert layer.dead_experts == [0, 2, 3]


def test_uneven_layer():
    layer = LayerRouting(torch.tensor([1, 3]), 2)
    assert layer.entropy == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2))
    assert layer.max_violation == pytest.approx(0.5)
    assert layer.coefficient_of_variation == pytest.approx(0.5)


def test_single_expert():
    layer = LayerRouting(torch.tensor([7]), 7)
    assert (layer.entropy, layer.max_violation, layer.coefficient_of_variation) == (1.0, 0.0, 0.0)


def test_summary_and_round_trip(tmp_path):
    statistics = RoutingStatistics(
        {
            "a": LayerRouting(torch.tensor([5, 3]), 4, num_zero_computation_experts=1, demand=torch.tensor([5, 5])),
            "b": LayerRouting(torch.tensor([0, 8, 0, 0]), 8),
        }
    )
    assert statistics.summary() == pytest.approx(
        {
            "entropy": 0.5, "max_violation": 1.5, "coefficient_of_variation": math.sqrt(3) / 2, "dead_fraction": 0.5,
            "experts_per_token": 1.5, "dropped_fraction": 0.1, "zero_computation_fraction": 3 / 16,
        }
    )  # fmt: skip
    assert statistics.to_dict()["summary"] == statistics.summary()
    statistics.save(tmp_path / "statistics.json")
    again = RoutingStatistics.from_dict(json.loads((tmp_path / "statistics.json").read_text()))
    assert again.to_dict() == statistics.to_dict()
    assert again["b"].num_tokens == 8
