# SPDX-License-Identifier: Apache-2.0
"""`RouterAgreement`: how far the routers of two models choose the same experts for the same tokens.

Dimension letters: T tokens, K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LayerAgreement:
    """
    The agreement of two routers.

    Args:
        overlap (`float`): Mean share of a token's experts that both choose, from 0 to 1; if one of them chooses fewer, of the
            larger number. Two routers that choose K of E at random come to K/E.
        exact (`float`): Share of the tokens for which both choose the same experts, in whatever order.
        first_choice (`float`): Share of the tokens whose expert with the largest logit is the same.
        num_tokens (`int`): Number of tokens.
    """

    overlap: float
    exact: float
    first_choice: float
    num_tokens: int


class RouterAgreement:
    """
    How far two models choose the same experts for the same text: OLMoE's router saturation
    (https://huggingface.co/papers/2409.02060), where the second model is the first after training.

    Args:
        choices (`Mapping[str, torch.Tensor]`): What [`RoutingRecorder.choices`] gives: by the name of the router, `(T, K)`
            experts, the first choice in front and -1 for none.
        reference (`Mapping[str, torch.Tensor]`): The same of the other model. Its routers may have other names; they are
            compared in their order.

    Raises:
        ValueError: if the models have different numbers of sparse layers or ran different numbers of tokens.

    Example:

    ```python
    >>> with RoutingRecorder(model, keep_choices=True) as recorder:
    ...     model(input_ids)
    >>> with RoutingRecorder(tuned, keep_choices=True) as tuned_recorder:
    ...     tuned(input_ids)
    >>> RouterAgreement(recorder.choices(), tuned_recorder.choices()).summary()
    ```
    """

    def __init__(self, choices: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]):
        if len(choices) != len(reference) or not choices:
            raise ValueError(
                f"Got the choices of {len(choices)} and of {len(reference)} sparse layers. Agreement is defined for models with "
                "equally many, one or more."
            )
        self.layers = {
            name: _layer_agreement(name, chosen_TK, reference_TK)
            for (name, chosen_TK), reference_TK in zip(choices.items(), reference.values(), strict=True)
        }

    def summary(self) -> dict[str, float]:
        """Means over layers of `overlap`, `exact` and `first_choice`."""
        return {
            field: sum(getattr(layer, field) for layer in self.layers.values()) / len(self.layers)
            for field in ("overlap", "exact", "first_choice")
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary and every layer, as plain values."""
        return {**self.summary(), "layers": {name: dict(vars(layer)) for name, layer in self.layers.items()}}


def _layer_agreement(name: str, chosen_TK: torch.Tensor, reference_TK: torch.Tensor) -> LayerAgreement:
    if len(chosen_TK) != len(reference_TK) or not len(chosen_TK):
        raise ValueError(
            f"{name}: got the choices of {len(chosen_TK)} and of {len(reference_TK)} tokens. Run both models on the same text, "
            "each in a recorder of its own."
        )
    is_expert_TK = chosen_TK >= 0
    is_shared_TK = (chosen_TK[:, :, None] == reference_TK[:, None, :]).any(-1) & is_expert_TK
    size_T = torch.maximum(is_expert_TK.sum(-1), (reference_TK >= 0).sum(-1))
    # Two routers that both choose nothing agree.
    overlap_T = torch.where(size_T > 0, is_shared_TK.sum(-1) / size_T.clamp(min=1), 1.0).double()
    return LayerAgreement(
        overlap=float(overlap_T.mean()),
        exact=float((overlap_T == 1).double().mean()),
        first_choice=float((chosen_TK[:, 0] == reference_TK[:, 0]).double().mean()),
        num_tokens=len(chosen_TK),
    )
