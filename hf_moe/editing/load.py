# SPDX-License-Identifier: Apache-2.0
"""Routing statistics of a model, as the load of the experts of its layers: `load_of_layers`."""

import json
from pathlib import Path

import torch

from ..training.statistics import RoutingStatistics
from ..upcycling.errors import UpcycleError
from .moe_checkpoint import MoeCheckpoint


def load_of_layers(moe: MoeCheckpoint, statistics: RoutingStatistics | str | Path) -> dict[int, torch.Tensor]:
    """
    The share of the tokens' slots that the router gave each expert, `(num_experts,)` per layer.

    Args:
        statistics (`RoutingStatistics`, `str` or `Path`): The statistics, or the file that `RoutingStatistics.save` wrote.

    Raises:
        UpcycleError: if they are of another model, or of no tokens.
    """
    if not isinstance(statistics, RoutingStatistics):
        statistics = _read(Path(statistics))
    loads = {}
    for index, block in moe.blocks.items():
        # Recorded inside a wrapper, the names have something in front.
        found = [layer for name, layer in statistics.layers.items() if f".{name}".endswith(f".{block.router}")]
        if len(found) != 1:
            raise UpcycleError(
                f"The statistics are of another model: they have {len(found)} routers named {block.router!r}, not one. Their "
                f"routers are {list(statistics.layers)[:3]}. Record them with this model (`hf-moe inspect --output`)."
            )
        if len(found[0].counts) != block.num_experts:
            raise UpcycleError(
                f"The statistics are of another model: {block.router!r} has {len(found[0].counts)} experts there and "
                f"{block.num_experts} here. Record them with this model (`hf-moe inspect --output`)."
            )
        if not found[0].demand.sum():
            raise UpcycleError(f"The statistics saw no tokens in {block.router!r}. Run text through the model first.")
        loads[index] = found[0].load
    if len(statistics.layers) != len(loads):
        raise UpcycleError(
            f"The statistics are of another model: they have {len(statistics.layers)} routers, and the model has {len(loads)}."
        )
    return loads


def describe_statistics(statistics: RoutingStatistics | str | Path | None) -> str | None:
    """What the provenance says of where the statistics came from."""
    if isinstance(statistics, RoutingStatistics):
        return "given in memory"
    return None if statistics is None else Path(statistics).name


def _read(path: Path) -> RoutingStatistics:
    if not path.is_file():
        raise UpcycleError(f"There is no file of statistics {path}.")
    try:
        return RoutingStatistics.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UpcycleError(f"{path} holds no statistics that `RoutingStatistics.save` wrote ({error!r}).") from error
