# SPDX-License-Identifier: Apache-2.0
"""
Routing as rows that `evaluate` can store: `RoutingMetric`, the base class of metrics on counts, and rows back to statistics.

`evaluate` keeps what it is given in Arrow files of fixed columns until `compute`. An example of a metric on counts is the
statistics of one text, and `add` and `add_batch` turn it into a row of plain values. So `compute`, adding step by step,
`evaluate.combine` and several processes all work as with any other metric.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import evaluate
import torch
from datasets import Value

from ..training.statistics import LayerRouting, RoutingStatistics


# One example: the layers of a `RoutingStatistics`.
ROUTING = [{"layer": Value("string"), "counts": [Value("int64")], "num_tokens": Value("int64")}]


class RoutingMetric(evaluate.Metric):
    """
    Base class of metrics whose examples are [`RoutingStatistics`], or what their `to_dict` gives.

    `predictions` is one of them, a list of them, or a dictionary from names to them; the names then are the references.
    """

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add the statistics of several texts."""
        if isinstance(predictions, RoutingStatistics) or _is_dictionary_of_statistics(predictions):
            predictions = [predictions]
        elif isinstance(predictions, Mapping):
            if references is not None:
                raise ValueError("Got a dictionary and references. Its keys are the references, so give either.")
            predictions, references = list(predictions.values()), list(predictions)
        if "references" in self._feature_names() and len(references or []) != len(predictions):
            raise ValueError(
                f"Got {len(references or [])} references for {len(predictions)} statistics. Give each its name: "
                '`predictions={"code": statistics, ...}`, or `references=["code", ...]`.'
            )
        super().add_batch(predictions=[_to_row(example) for example in predictions], references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add the statistics of one text."""
        # `evaluate.combine` gives a single example under the names of many.
        example = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: None if value is None else [value] for name, value in example.items()})


def merge_rows(rows: Iterable[list[dict[str, Any]]]) -> RoutingStatistics:
    """
    The statistics of all examples together: counts and tokens of a layer are added.

    Raises:
        ValueError: if a layer has another number of experts in another example.
    """
    layers: dict[str, LayerRouting] = {}
    for row in rows:
        for values in row:
            counts, num_tokens = torch.tensor(values["counts"], dtype=torch.int64), values["num_tokens"]
            if values["layer"] in layers:
                before = layers[values["layer"]]
                if len(before.counts) != len(counts):
                    raise ValueError(
                        f"{values['layer']} has {len(before.counts)} experts in one example and {len(counts)} in another. "
                        "Compute the metric for each model by itself."
                    )
                counts, num_tokens = before.counts + counts, before.num_tokens + num_tokens
            layers[values["layer"]] = LayerRouting(counts, num_tokens)
    return RoutingStatistics(layers)


def _is_dictionary_of_statistics(value: Any) -> bool:
    """Whether it is what [`RoutingStatistics.to_dict`] gives."""
    return isinstance(value, Mapping) and set(value) == {"summary", "layers"}


def _to_row(example: Any) -> list[dict[str, Any]]:
    if not isinstance(example, RoutingStatistics):
        if not _is_dictionary_of_statistics(example):
            raise ValueError(
                f"Got a {type(example).__name__} for the routing of a text. Give `recorder.statistics()` of a RoutingRecorder, "
                "or its `to_dict()`."
            )
        example = RoutingStatistics.from_dict(dict(example))
    return [
        {"layer": name, "counts": layer.demand.tolist(), "num_tokens": layer.num_tokens}
        for name, layer in example.layers.items()
    ]
