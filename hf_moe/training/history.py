# SPDX-License-Identifier: Apache-2.0
"""`RoutingHistory`: the routing statistics of a training, step by step, in a file that grows."""

import json
from dataclasses import dataclass
from pathlib import Path

from .statistics import RoutingStatistics


FILE_NAME = "routing_history.jsonl"


@dataclass(frozen=True)
class RoutingHistory:
    """
    Routing statistics over a training.

    Args:
        steps (`list[int]`): Optimizer steps at which they were logged.
        statistics (`list[RoutingStatistics]`): Of the tokens between the log before and this one.
    """

    steps: list[int]
    statistics: list[RoutingStatistics]

    @classmethod
    def load(cls, folder: str | Path) -> "RoutingHistory":
        """
        Read `routing_history.jsonl`, which a [`RouterStatisticsCallback`] wrote.

        Raises:
            ValueError: if there is none.
        """
        path = Path(folder) if Path(folder).name == FILE_NAME else Path(folder, FILE_NAME)
        if not path.is_file():
            raise ValueError(f"{folder} has no {FILE_NAME}, which RouterStatisticsCallback(folder=...) writes.")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls([line["step"] for line in lines], [RoutingStatistics.from_dict(line) for line in lines])

    @staticmethod
    def begin(folder: str | Path, step: int) -> None:
        """
        Make the file, or keep of it what was written up to a step from which a training goes on.

        Raises:
            ValueError: if a training begins at step 0 and the file is that of another.
        """
        path = Path(folder, FILE_NAME)
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{folder} is a file. Give a folder for the history of the routing.")
        if path.is_file() and path.stat().st_size and not step:
            raise ValueError(f"{path} is there already, from another training. Delete it, or choose another folder.")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")

    @staticmethod
    def append(folder: str | Path, step: int, statistics: RoutingStatistics) -> None:
        """Add a line."""
        layers = {
            name: {
                "counts": layer.counts.tolist(),
                "demand": layer.demand.tolist(),
                "num_tokens": layer.num_tokens,
                "num_zero_computation_experts": layer.num_zero_computation_experts,
            }
            for name, layer in statistics.layers.items()
        }
        with Path(folder, FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")
