# SPDX-License-Identifier: Apache-2.0
"""`ExpertSpecialization`: how much a layer's experts tell about the domain of a text, from counts of several domains.

Dimension letters: D domains, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .statistics import RoutingStatistics


WEIGHTINGS = ("equal", "tokens")


@dataclass(frozen=True)
class LayerSpecialization:
    """
    The routing of one layer over several domains.

    Args:
        counts (`torch.Tensor` of shape `(num_domains, num_experts)`): Number of slots of each domain that the router gave each expert.
        weights (`torch.Tensor` of shape `(num_domains,)`): Share of each domain; sums to 1.
    """

    counts: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def load(self) -> torch.Tensor:
        """`(num_domains, num_experts)` share of the domain's slots that each expert got; a domain's shares sum to 1."""
        return self.counts.double() / self.counts.sum(-1, keepdim=True)

    @cached_property
    def contributions(self) -> torch.Tensor:
        """
        `(num_domains, num_experts)` share of each pair in the mutual information, in nats: positive where the expert serves
        the domain more often than it serves all.
        """
        joint_DE = self.weights[:, None] * self.load
        expected_DE = self.weights[:, None] * joint_DE.sum(0)
        return torch.special.xlogy(joint_DE, joint_DE / expected_DE.clamp(min=torch.finfo(torch.float64).tiny))

    @property
    def mutual_information(self) -> float:
        """Mutual information of a slot's expert and its domain, in nats."""
        return max(float(self.contributions.sum()), 0.0)

    @property
    def bias(self) -> float:
        """
        What [`~LayerSpecialization.mutual_information`] is on average, in nats, if the experts tell nothing about the domain
        (Miller, 1955): `(E - 1) (D - 1) / 2N` with N slots, E the experts in use, where domains weigh as their slots or have
        equally many. The slots are taken as independent; those of running text are not, so it is rather more.
        """
        num_used = int((self.counts.sum(0) > 0).sum())
        return (num_used - 1) / 2 * float((self.weights * (1 - self.weights) / self.counts.sum(-1)).sum())

    @property
    def domain_entropy(self) -> float:
        """Entropy of the domains in nats, the most that [`~LayerSpecialization.mutual_information`] can be."""
        return float(torch.special.entr(self.weights).sum())

    @property
    def specialization(self) -> float:
        """Mutual information divided by the entropy of the domains: 0 if experts and domains are independent, 1 if every
        expert serves a single domain."""
        return self.mutual_information / self.domain_entropy


class ExpertSpecialization:
    """
    How much the experts of every layer tell about the domain of a text: the mutual information that Mod-Squad trains for
    (https://huggingface.co/papers/2212.08066), with the domains in the place of tasks.

    Args:
        statistics (`Mapping[str, RoutingStatistics]`): By the name of the domain, two or more of one model.
        weighting (`str`, *optional*, defaults to `"equal"`): `"equal"` weighs all domains alike, `"tokens"` each by the slots
            of its tokens.

    Raises:
        ValueError: if there are fewer than two domains, one has no counts in a layer, or they are not of the same model.

    Example:

    ```python
    >>> specialization = ExpertSpecialization({"code": code_recorder.statistics(), "legal": legal_recorder.statistics()})
    >>> specialization.summary()["specialization"]
    ```
    """

    def __init__(self, statistics: Mapping[str, RoutingStatistics], weighting: str = "equal"):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
        if len(statistics) < 2:
            raise ValueError(
                f"Specialisation compares two domains or more, got {len(statistics)} ({', '.join(statistics) or 'none'})."
            )
        self.domains = list(statistics)
        self.layers: dict[str, LayerSpecialization] = {}
        for name, counts in _stacked_counts(statistics).items():
            slots = counts.sum(-1).double()
            weights = slots / slots.sum() if weighting == "tokens" else torch.full_like(slots, 1 / len(slots))
            self.layers[name] = LayerSpecialization(counts, weights)

    def summary(self) -> dict[str, float]:
        """Means over layers of `mutual_information`, `specialization` and `bias`."""
        return {
            field: sum(getattr(layer, field) for layer in self.layers.values()) / len(self.layers)
            for field in ("mutual_information", "specialization", "bias")
        }

    def top_experts(self, count: int = 3) -> dict[str, list[dict[str, Any]]]:
        """
        The experts that stand out for each domain: those which add most to the mutual information.

        Args:
            count (`int`, *optional*, defaults to 3): Number of experts of a domain.

        Returns:
            `dict[str, list[dict]]`: By the domain, the `layer` (name of its router), the `expert`, its `load`, the share of
            the domain's slots in that layer that it serves, and its `load_elsewhere`, the mean of that in the other
            domains. An expert that serves a domain less often than the others is not listed.
        """
        return {domain: self._top_experts(index, count) for index, domain in enumerate(self.domains)}

    def _top_experts(self, domain: int, count: int) -> list[dict[str, Any]]:
        names = list(self.layers)
        candidates = [
            (float(contribution), layer, expert)
            for layer, name in enumerate(names)
            for expert, contribution in enumerate(self.layers[name].contributions[domain])
            if contribution > 1e-12
        ]
        rows = []
        for _, layer, expert in sorted(candidates, key=lambda row: (-row[0], row[1:]))[:count]:
            load_D = self.layers[names[layer]].load[:, expert]
            load = float(load_D[domain])
            elsewhere = (float(load_D.sum()) - load) / (len(load_D) - 1)
            rows.append({"layer": names[layer], "expert": expert, "load": load, "load_elsewhere": elsewhere})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The summary, every layer and the experts that stand out, as plain values."""
        return {
            **self.summary(),
            "layers": {
                name: {
                    "mutual_information": layer.mutual_information,
                    "specialization": layer.specialization,
                    "bias": layer.bias,
                }
                for name, layer in self.layers.items()
            },
            "top_experts": self.top_experts(),
        }


def _stacked_counts(statistics: Mapping[str, RoutingStatistics]) -> dict[str, torch.Tensor]:
    """By the name of the router, `(D, E)` counts."""
    first, expected = next(iter(statistics.items()))
    sizes = {name: len(layer.counts) for name, layer in expected.layers.items()}
    for domain, routing in statistics.items():
        if {name: len(layer.counts) for name, layer in routing.layers.items()} != sizes:
            raise ValueError(
                f"The domains {first!r} and {domain!r} have other routers or other numbers of experts. Record all domains with "
                "one model."
            )
        for name, layer in routing.layers.items():
            if not layer.demand.sum():
                raise ValueError(
                    f"No expert of {name} served a token of {domain!r}. Give it more text, or leave it out."
                )
    return {name: torch.stack([routing[name].demand for routing in statistics.values()]) for name in sizes}
