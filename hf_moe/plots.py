# SPDX-License-Identifier: Apache-2.0
"""Pictures of routing, drawn with matplotlib (`pip install hf-moe[plots]`)."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .training.statistics import RoutingStatistics


def plot_load(statistics: "RoutingStatistics", path: str | Path | None = None, title: str = "") -> "Figure":
    """
    Heat map of the load, layer x expert, with each layer's entropy beside it.

    Args:
        statistics ([`RoutingStatistics`]): What was recorded.
        path (`str` or `Path`, *optional*): Where to save the picture.
        title (`str`, *optional*): A line above it.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install hf-moe[plots]`.") from error

    layers = list(statistics.layers.values())
    num_experts = max(len(layer.counts) for layer in layers)
    # Relative to an even share, so that 1 means balanced whatever the number of experts.
    relative = np.full((len(layers), num_experts), np.nan)
    for row, layer in enumerate(layers):
        relative[row, : len(layer.counts)] = layer.load.numpy() * len(layer.counts)
    labels = [layer_number(name) for name in statistics.layers]

    figure = Figure(figsize=(4.2 + 0.32 * num_experts, 1.8 + 0.2 * len(layers)), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[max(3, 0.32 * num_experts), 1.2])
    image = heat.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    heat.set_xticks(range(0, num_experts, max(1, num_experts // 16)))
    step = max(1, len(layers) // 30)
    heat.set_yticks(range(0, len(layers), step), labels[::step])
    figure.colorbar(image, ax=heat, label="load / even share", extend="max")

    bars.barh(range(len(layers)), [layer.entropy for layer in layers], color="0.45")
    bars.axvline(1, color="0.8", linewidth=1, zorder=0)
    bars.set_xlim(0, 1.05)
    bars.set_xlabel("entropy")
    bars.tick_params(axis="y", labelleft=False)
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def layer_number(name: str) -> str:
    """`"3"` for `"model.layers.3.mlp.gate"`."""
    return next((part for part in name.split(".") if part.isdigit()), name)
