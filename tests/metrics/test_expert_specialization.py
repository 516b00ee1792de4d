# SPDX-License-Identifier: Apache-2.0
"""Specialisation, computed by `evaluate` from the statistics of several domains."""

import math

import evaluate
import pytest
import torch

from hf_moe import metric_path
from hf_moe.training.statistics import LayerRouting, RoutingStatistics


@pytest.fixture(scope="module")
def expert_specialization():
    return evaluate.load(metric_path("expert_specialization"))


def statistics(*counts: int) -> RoutingStatistics:
    return RoutingStatistics({"gate": LayerRouting(torch.tensor(counts), sum(counts))})


def test_closed_forms(expert_specialization):
    found = expert_specialization.compute(predictions={"a": statistics(7, 0, 0), "b": statistics(0, 5, 5)})
    assert (found["specialization"], found["mutual_information"]) == pytest.approx((1, math.log(2)))
    assert [row["expert"] for row in found["top_experts"]["b"]] == [1, 2]
    found = expert_specialization.compute(predictions={"a": statistics(2, 1), "b": statistics(20, 10)})
    assert found["specialization"] == pytest.approx(0)
    assert found["bias"] == pytest.approx(0.5 * (0.25 / 3 + 0.25 / 30))


def test_examples_of_one_domain_are_added(expert_specialization):
    expected = expert_specialization.compute(predictions={"a": statistics(4, 6), "b": statistics(9, 1)})
    for domain, counts in (("a", (1, 5)), ("b", (9, 1)), ("a", (3, 1))):
        expert_specialization.add(prediction=statistics(*counts), reference=domain)
    assert expert_specialization.compute() == expected


def test_weighting(expert_specialization):
    # Nearly all of the text is of one domain: about it there is less to tell.
    domains = {"a": statistics(999, 0), "b": statistics(0, 1)}
    found = expert_specialization.compute(predictions=domains, weighting="tokens")
    assert found["mutual_information"] == pytest.approx(-0.999 * math.log(0.999) - 0.001 * math.log(0.001))
    assert found["specialization"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [statistics(1, 2)]}, "0 references for 1 statistics"),
        ({"predictions": [statistics(1, 2)], "references": ["a", "b"]}, "2 references for 1 statistics"),
        ({"predictions": {"a": statistics(1, 2)}, "references": ["a"]}, "dictionary and references"),
        ({"predictions": {"a": statistics(1, 2)}}, "two domains or more, got 1"),
        ({"predictions": {"a": statistics(1), "b": statistics(1)}, "weighting": "bytes"}, "got 'bytes'"),
    ],
)
def test_what_cannot_be_computed_is_refused(expert_specialization, arguments, message):
    with pytest.raises(ValueError, match=message):
        expert_specialization.compute(**arguments)
