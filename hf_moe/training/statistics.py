# SPDX-License-Identifier: Apache-2.0
"""`RoutingStatistics`: how evenly the experts of each layer are used, computed from counts alone."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class LayerRouting:
    """
    The routing of one layer.

    What says how even it is (`load`, `entropy`, `max_violation`, `coefficient_of_variation`, `dead_experts`) is about the slots that the
    router gave each expert, `demand`: a capacity makes those even that are served by dropping the others. What is served is in
    `counts`, and in `experts_per_token`, `dropped_fraction` and `zero_computation_fraction`.

    Args:
        counts (`torch.Tensor` of shape `(num_experts,)`): Number of token slots each expert served.
        num_tokens (`int`): Number of tokens seen, padding left out.
        num_zero_computation_experts (`int`, *optional*, defaults to 0): How many of the experts, the last ones, compute nothing.
        demand (`torch.Tensor` of shape `(num_experts,)`, *optional*): Number of token slots that the router gave each expert, before a
            capacity dropped some of them; `counts` by default.
    """

    counts: torch.Tensor
    num_tokens: int
    num_zero_computation_experts: int = 0
    demand: torch.Tensor = None

    def __post_init__(self):
        if self.demand is None:
            object.__setattr__(self, "demand", self.counts)

    def __add__(self, other: "LayerRouting") -> "LayerRouting":
        """The routing of both texts."""
        return replace(
            self,
            counts=self.counts + other.counts,
            num_tokens=self.num_tokens + other.num_tokens,
            demand=self.demand + other.demand,
        )

    @property
    def num_dropped(self) -> int:
        """Number of slots that found no room."""
        return int((self.demand - self.counts).sum())

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that served a token, those without computation included."""
        return int(self.counts.sum()) / max(self.num_tokens, 1)

    @property
    def dropped_fraction(self) -> float:
        """Share of the slots that found no room."""
        return self.num_dropped / max(int(self.demand.sum()), 1)

    @property
    def zero_computation_fraction(self) -> float:
        """Share of the served slots that went to experts that compute nothing."""
        first = len(self.counts) - self.num_zero_computation_experts
        return int(self.counts[first:].sum()) / max(int(self.counts.sum()), 1)

    @property
    def load(self) -> torch.Tensor:
        """Share of the slots that the router gave each expert, `(num_experts,)`; sums to 1."""
        return self.demand.double() / max(int(self.demand.sum()), 1)

    @property
    def entropy(self) -> float:
        """Entropy of the load divided by its maximum: 1 if all experts get the same, 0 if one gets all."""
        load = self.load
        return float(torch.special.entr(load).sum()) / math.log(len(load)) if len(load) > 1 else 1.0

    @property
    def max_violation(self) -> float:
        """`(largest - mean) / mean` of the demand: 0 if balanced, `num_experts - 1` if one expert gets all."""
        return float(self.load.max()) * len(self.counts) - 1

    @property
    def coefficient_of_variation(self) -> float:
        """Population standard deviation of the demand divided by its mean: 0 if balanced."""
        return float(self.load.std(correction=0)) * len(self.counts)

    @property
    def dead_experts(self) -> list[int]:
        """Experts that no token was routed to."""
        return torch.nonzero(self.demand == 0).flatten().tolist()


class RoutingStatistics:
    """
    The routing of every sparse layer.

    Args:
        layers (`dict[str, LayerRouting]`): By the name of the layer's router, in the order of the model.

    Example:

    ```python
    >>> statistics = recorder.statistics()
    >>> statistics["model.layers.0.mlp.gate"].entropy
    0.97
    ```
    """

    def __init__(self, layers: dict[str, LayerRouting]):
        self.layers = layers

    def __getitem__(self, name: str) -> LayerRouting:
        return self.layers[name]

    @classmethod
    def sum(cls, statistics: "Iterable[RoutingStatistics]") -> "RoutingStatistics":
        """The statistics of several texts as those of one."""
        first, *others = statistics
        layers = dict(first.layers)
        for other in others:
            for name, layer in other.layers.items():
                layers[name] = layers[name] + layer if name in layers else layer
        return cls(layers)

    def summary(self) -> dict[str, float]:
        """
        Means over layers of what [`LayerRouting`] has of each, and `dead_fraction`, the share of dead experts over all layers.

        Returns:
            `dict[str, float]`: `entropy`, `max_violation`, `coefficient_of_variation` and `dead_fraction` of what the routers want;
            `experts_per_token`, `dropped_fraction` and `zero_computation_fraction` of what is served.
        """
        layers = list(self.layers.values())
        num_experts = sum(len(layer.counts) for layer in layers)
        return {
            "entropy": sum(layer.entropy for layer in layers) / len(layers),
            "max_violation": sum(layer.max_violation for layer in layers) / len(layers),
            "coefficient_of_variation": sum(layer.coefficient_of_variation for layer in layers) / len(layers),
            "dead_fraction": sum(len(layer.dead_experts) for layer in layers) / num_experts,
            "experts_per_token": sum(layer.experts_per_token for layer in layers) / len(layers),
            "dropped_fraction": sum(layer.dropped_fraction for layer in layers) / len(layers),
            "zero_computation_fraction": sum(layer.zero_computation_fraction for layer in layers) / len(layers),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; [`RoutingStatistics.from_dict`] reads it back."""
        return {
            "summary": self.summary(),
            "layers": {
                name: {
                    "counts": layer.counts.tolist(),
                    "demand": layer.demand.tolist(),
                    "num_tokens": layer.num_tokens,
                    "load": layer.load.tolist(),
                    "entropy": layer.entropy,
                    "max_violation": layer.max_violation,
                    "coefficient_of_variation": layer.coefficient_of_variation,
                    "dead_experts": layer.dead_experts,
                    "num_dropped": layer.num_dropped,
                    "num_zero_computation_experts": layer.num_zero_computation_experts,
                    "experts_per_token": layer.experts_per_token,
                }
                for name, layer in self.layers.items()
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RoutingStatistics":
        """Statistics from what [`RoutingStatistics.to_dict`] gave."""
        return cls(
            {
                name: LayerRouting(
                    torch.tensor(layer["counts"], dtype=torch.int64),
                    layer["num_tokens"],
                    # Files from before there were capacities do not have these.
                    layer.get("num_zero_computation_experts", 0),
                    torch.tensor(layer.get("demand", layer["counts"]), dtype=torch.int64),
                )
                for name, layer in values["layers"].items()
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the statistics as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def layer_number(name: str) -> str:
    """`"3"` for `"model.layers.3.mlp.gate"`."""
    return next((part for part in name.split(".") if part.isdigit()), name)
