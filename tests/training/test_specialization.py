# SPDX-License-Identifier: Apache-2.0
"""Specialisation beside closed forms, the definition pair by pair, and simulated text."""

import math

import pytest
import torch

from hf_moe.training.specialization import ExpertSpecialization
from hf_moe.training.statistics import LayerRouting, RoutingStatistics


def statistics(*layers: list[int]) -> RoutingStatistics:
    return RoutingStatistics(
        {
            f"layers.{index}.gate": LayerRouting(torch.tensor(counts), sum(counts))
            for index, counts in enumerate(layers)
        }
    )


def test_independent_domains():
    found = ExpertSpecialization({"a": statistics([10, 30, 60]), "b": statistics([1, 3, 6])})
    assert found.summary() == pytest.approx(
        {"mutual_information": 0, "specialization": 0, "bias": 2 / 2 * (0.25 / 100 + 0.25 / 10)}
    )
    assert found.top_experts() == {"a": [], "b": []}


@pytest.mark.parametrize("num_domains", [2, 3, 5])
def test_an_expert_for_each_domain(num_domains):
    counts = torch.eye(num_domains + 1, dtype=torch.int64)[:num_domains] * 7
    found = ExpertSpecialization({f"domain {index}": statistics(row.tolist()) for index, row in enumerate(counts)})
    assert found.summary()["mutual_information"] == pytest.approx(math.log(num_domains))
    assert found.summary()["specialization"] == pytest.approx(1)
    assert found.top_experts()["domain 1"] == [
        {"layer": "layers.0.gate", "expert": 1, "load": 1.0, "load_elsewhere": 0.0}
    ]


def mutual_information(joint: list[list[float]]) -> float:
    """By the definition, pair by pair."""
    rows, columns = [sum(row) for row in joint], [sum(column) for column in zip(*joint, strict=True)]
    total = sum(rows)
    return sum(
        value / total * math.log(value * total / (rows[i] * columns[j]))
        for i, row in enumerate(joint)
        for j, value in enumerate(row)
        if value
    )


def test_any_counts_with_both_weightings():
    counts = [[5, 0, 12, 3], [40, 2, 9, 9], [0, 1, 1, 1]]
    domains = {f"domain {index}": statistics(row) for index, row in enumerate(counts)}
    by_tokens = ExpertSpecialization(domains, weighting="tokens").layers["layers.0.gate"]
    assert by_tokens.mutual_information == pytest.approx(mutual_information(counts))
    assert by_tokens.bias == pytest.approx((4 - 1) * (3 - 1) / (2 * 83))
    alike = ExpertSpecialization(domains).layers["layers.0.gate"]
    assert alike.mutual_information == pytest.approx(
        mutual_information([[n / sum(row) for n in row] for row in counts])
    )
    assert alike.specialization == pytest.approx(alike.mutual_information / math.log(3))


@pytest.mark.parametrize("sizes", [(200, 200, 200), (100, 300, 800)])
def test_bias_is_what_independent_slots_give_on_average(sizes):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.05, 0.05, 0.0])
    found = []
    for _ in range(400):
        drawn = [torch.multinomial(probabilities, size, True, generator=generator) for size in sizes]
        rows = [torch.bincount(experts, minlength=7).tolist() for experts in drawn]
        layer = ExpertSpecialization(dict(zip("abc", map(statistics, rows), strict=True))).layers["layers.0.gate"]
        found.append((layer.mutual_information, layer.bias))
    measured, bias = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    assert measured == pytest.approx(bias, rel=0.1)


def test_means_over_layers_and_experts_that_stand_out():
    found = ExpertSpecialization(
        {
            "a": statistics([50, 50], [90, 5, 5]),
            "b": statistics([50, 50], [10, 45, 45]),
            "c": statistics([50, 50], [10, 45, 45]),
        }
    )
    layers = list(found.layers.values())
    assert layers[0].mutual_information == pytest.approx(0)
    assert found.summary()["mutual_information"] == pytest.approx(layers[1].mutual_information / 2)
    assert found.top_experts(1)["a"] == [
        {"layer": "layers.1.gate", "expert": 0, "load": pytest.approx(0.9), "load_elsewhere": pytest.approx(0.1)}
    ]
    assert [row["expert"] for row in found.top_experts()["b"]] == [1, 2]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({}, "got 0"),
        ({"a": [[1, 2]]}, "two domains or more, got 1"),
        ({"a": [[1, 2]], "b": [[1, 2, 3]]}, "'a' and 'b' have other routers"),
        ({"a": [[1, 2]], "b": [[1, 2], [3, 4]]}, "'a' and 'b' have other routers"),
        ({"a": [[1, 2]], "b": [[0, 0]]}, "No expert of layers.0.gate served a token of 'b'"),
    ],
)
def test_what_cannot_be_compared_is_refused(domains, message):
    with pytest.raises(ValueError, match=message):
        ExpertSpecialization({name: statistics(*layers) for name, layers in domains.items()})


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="equal, tokens, got 'bytes'"):
        ExpertSpecialization({"a": statistics([1, 2]), "b": statistics([1, 2])}, weighting="bytes")
