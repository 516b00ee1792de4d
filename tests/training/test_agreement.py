# SPDX-License-Identifier: Apache-2.0
"""Agreement of routers beside sets of Python, token by token."""

import pytest
import torch

from hf_moe.training.agreement import RouterAgreement


def by_hand(chosen_TK: torch.Tensor, reference_TK: torch.Tensor) -> tuple[float, float, float]:
    pairs = list(zip(chosen_TK.tolist(), reference_TK.tolist(), strict=True))
    sets = [({*a} - {-1}, {*b} - {-1}) for a, b in pairs]
    return (
        sum(len(a & b) / max(len(a), len(b)) if a | b else 1 for a, b in sets) / len(pairs),
        sum(a == b for a, b in sets) / len(pairs),
        sum(a[0] == b[0] for a, b in pairs) / len(pairs),
    )


@pytest.mark.parametrize(("top_k", "reference_top_k"), [(1, 1), (2, 2), (3, 3), (3, 2)])
def test_random_choices(top_k, reference_top_k):
    generator = torch.Generator().manual_seed(0)

    def choices(width: int) -> dict[str, torch.Tensor]:
        index_LTK = torch.rand(2, 60, 6, generator=generator).argsort(-1)[..., :width]
        index_LTK[:, ::4, -1] = -1  # now and then a slot is skipped
        return dict(zip("ab", index_LTK, strict=True))

    first, second = choices(top_k), choices(reference_top_k)
    found = RouterAgreement(first, {f"module.{name}": index_TK for name, index_TK in second.items()})
    expected = [by_hand(first[name], second[name]) for name in "ab"]
    for layer, values in zip(found.layers.values(), expected, strict=True):
        assert (layer.overlap, layer.exact, layer.first_choice) == pytest.approx(values)
    assert list(found.summary().values()) == pytest.approx([sum(pair) / 2 for pair in zip(*expected, strict=True)])
    assert found.to_dict()["layers"]["a"]["num_tokens"] == 60


def test_order_counts_for_the_first_choice_only():
    found = RouterAgreement({"a": torch.tensor([[0, 1], [2, 3]])}, {"a": torch.tensor([[1, 0], [2, 3]])})
    assert found.summary() == {"overlap": 1.0, "exact": 1.0, "first_choice": 0.5}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({}, "of 1 and of 0 sparse layers"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(4, 2)}, "of 1 and of 2 sparse layers"),
        ({"a": torch.zeros(5, 2)}, "a: got the choices of 4 and of 5 tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        RouterAgreement({"a": torch.zeros(4, 2)}, reference)
