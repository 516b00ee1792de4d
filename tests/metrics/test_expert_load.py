# SPDX-License-Identifier: Apache-2.0
"""Expert load, computed by `evaluate` from what a recorder gives."""

import math

import evaluate
import numpy as np
import pytest
import torch
from conftest import moe_model

from hf_moe import RoutingRecorder, metric_path
from hf_moe.training.statistics import LayerRouting, RoutingStatistics


@pytest.fixture(scope="module")
def expert_load():
    return evaluate.load(metric_path("expert_load"))


def statistics(*layers: list[int]) -> RoutingStatistics:
    return RoutingStatistics(
        {f"gate {index}": LayerRouting(torch.tensor(row), sum(row)) for index, row in enumerate(layers)}
    )


def by_hand(rows: np.ndarray) -> dict[str, float]:
    """Means over layers of `(L, E)` counts."""
    shares = rows / rows.sum(1, keepdims=True)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    return {
        "coefficient_of_variation": np.mean(rows.std(1) / rows.mean(1)),
        "max_violation": np.mean(rows.max(1) / rows.mean(1) - 1),
        "entropy": np.mean(-(shares * logarithms).sum(1) / math.log(rows.shape[1])),
        "dead_fraction": np.mean(rows == 0),
    }


def test_counts(expert_load):
    rows = [[5, 0, 12, 3], [40, 2, 0, 0]]
    found = expert_load.compute(predictions=statistics(*rows))
    layers = found.pop("layers")
    assert found == pytest.approx(by_hand(np.array(rows)))
    for index, row in enumerate(rows):
        assert layers[f"gate {index}"] == pytest.approx(by_hand(np.array([row])))


def test_forms_of_the_input(expert_load):
    first, second = statistics([1, 2], [3, 4]), statistics([10, 0], [0, 1])
    expected = expert_load.compute(predictions=statistics([11, 2], [3, 5]))
    assert expert_load.compute(predictions=[first, second.to_dict()]) == expected
    assert expert_load.compute(predictions={"a": first, "b": second}) == expected
    expert_load.add(prediction=first.to_dict())
    expert_load.add_batch(predictions=second)
    assert expert_load.compute() == expected


def test_of_a_recorder(expert_load, batch):
    model = moe_model("llama")
    with RoutingRecorder(model) as recorder:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    counts = np.array([layer.counts.numpy() for layer in recorder.statistics().layers.values()])
    found = expert_load.compute(predictions=recorder.statistics())
    assert list(found.pop("layers")) == list(recorder.routers)
    assert found == pytest.approx(by_hand(counts))


def test_combined_with_specialisation(expert_load):
    both = evaluate.combine([expert_load, evaluate.load(metric_path("expert_specialization"))])
    domains = {"a": statistics([9, 0, 0]), "b": statistics([0, 9, 0])}
    found = both.compute(predictions=list(domains.values()), references=list(domains))
    assert (found["specialization"], found["dead_fraction"]) == pytest.approx((1, 1 / 3))
    assert set(found["expert_load_layers"]) == set(found["expert_specialization_layers"]) == {"gate 0"}
    assert both.compute(predictions=domains) == found
    for domain, routing in domains.items():
        both.add(prediction=routing, reference=domain)
    assert both.compute() == found


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([[1, 2, 3]], "Got a list for the routing of a text. Give `recorder.statistics"),
        ({"gate": {"counts": [1, 2]}}, "Got a dict for the routing"),
        ([statistics([1, 2]), statistics([1, 2, 3])], "gate 0 has 2 experts in one example and 3 in another"),
    ],
)
def test_what_is_no_routing_is_refused(expert_load, predictions, message):
    with pytest.raises(ValueError, match=message):
        expert_load.compute(predictions=predictions)
    assert expert_load.compute(predictions=statistics([1, 1]))["entropy"] == pytest.approx(1), "nothing is left behind"
