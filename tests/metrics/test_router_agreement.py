# SPDX-License-Identifier: Apache-2.0
"""Agreement of two models, computed by `evaluate` from the choices of their recorders."""

import copy

import evaluate
import pytest
import torch
from conftest import moe_model

from hf_moe import RoutingRecorder, metric_path
from hf_moe.training.agreement import RouterAgreement


@pytest.fixture(scope="module")
def router_agreement():
    return evaluate.load(metric_path("router_agreement"))


@torch.no_grad()
def choices(model, batch) -> dict[str, torch.Tensor]:
    with RoutingRecorder(model, keep_choices=True) as recorder:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    return recorder.choices()


def test_a_model_agrees_with_itself_and_less_with_another(router_agreement, batch):
    model = moe_model("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight.neg_()
    first, second = choices(model, batch), choices(other, batch)
    same = router_agreement.compute(predictions=first, references=first)
    assert [same[name] for name in ("overlap", "exact", "first_choice")] == [1, 1, 1]
    found = router_agreement.compute(predictions=first, references=second)
    layers = list(found["layers"].values())
    assert layers[0] == {"overlap": 1, "exact": 1, "first_choice": 1, "num_tokens": int(batch["attention_mask"].sum())}
    # Of 4 experts both choose 2, the second model those with the smallest logits.
    assert (layers[1]["overlap"], layers[1]["first_choice"]) == (0, 0)
    assert layers[2]["overlap"] < 1
    assert found["overlap"] == pytest.approx(sum(layer["overlap"] for layer in layers) / 3)


def test_batches_are_added(router_agreement):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {name: torch.rand(20, 5, generator=generator).argsort(-1)[:, :2] for name in "ab"} for _ in range(2)
    )
    for rows in (slice(0, 6), slice(6, 20)):
        router_agreement.add_batch(
            predictions={name: index_TK[rows] for name, index_TK in first.items()},
            references={f"module.{name}": index_TK[rows] for name, index_TK in second.items()},
        )
    assert router_agreement.compute() == RouterAgreement(first, second).to_dict()


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "Got a NoneType for the choices of a model"),
        ([[0, 1]], "Got a list for the choices of a model"),
        ({}, "of 1 and of 0 sparse layers"),
        ({"gate": torch.zeros(3, 2)}, "of 2 and of 3 tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(router_agreement, references, message):
    with pytest.raises(ValueError, match=message):
        router_agreement.compute(predictions={"gate": torch.zeros(2, 2, dtype=torch.int64)}, references=references)
