# SPDX-License-Identifier: Apache-2.0
"""Pictures of routing, drawn with matplotlib (`pip install hf-moe[plots]`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .training.statistics import layer_number


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .training.history import RoutingHistory
    from .training.statistics import RoutingStatistics


MAX_LAYERS = 4  # of which the load over steps is drawn


def plot_load(statistics: "RoutingStatistics", path: str | Path | None = None, title: str = "") -> "Figure":
    """
    Heat map of the load, layer x expert, with each layer's entropy beside it. Zero-computation experts are hatched.

    Args:
        statistics ([`RoutingStatistics`]): What was recorded.
        path (`str` or `Path`, *optional*): Where to save the picture.
        title (`str`, *optional*): A line above it.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: if matplotlib is not installed.
    """
    layers = list(statistics.layers.values())
    num_experts = max(len(layer.counts) for layer in layers)
    figure = _figure((4.2 + 0.32 * num_experts, 1.8 + 0.2 * len(layers)))
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[max(3, 0.32 * num_experts), 1.2])
    image = _heat_map(heat, _relative_load([layer.load.numpy() for layer in layers]))
    _hatch_zero_experts(heat, [(len(layer.counts), layer.num_zero_computation_experts) for layer in layers])
    heat.set_ylabel("layer")
    _label_layers(heat, list(statistics.layers))
    bars.barh(range(len(layers)), [layer.entropy for layer in layers], color="0.45")
    bars.axvline(1, color="0.8", linewidth=1, zorder=0)
    bars.set_xlim(0, 1.05)
    bars.set_xlabel("entropy")
    bars.tick_params(axis="y", labelleft=False)
    figure.colorbar(image, ax=[heat, bars], label="load / even share", extend="max")
    return _finish(figure, path, title)


def plot_history(history: "RoutingHistory", path: str | Path | None = None, title: str = "") -> "Figure":
    """
    How the load changed in a training: three measures over the steps, and the load of some layers, step x expert.

    Args:
        history ([`RoutingHistory`]): What a [`RouterStatisticsCallback`] wrote.
        path (`str` or `Path`, *optional*): Where to save the picture.
        title (`str`, *optional*): A line above it.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: if the history is empty.
        ImportError: if matplotlib is not installed.
    """
    if not history.steps:
        raise ValueError("The history is empty: nothing was logged.")
    names = list({name: None for one in history.statistics for name in one.layers})
    shown = [
        names[place] for place in np.unique(np.linspace(0, len(names) - 1, min(MAX_LAYERS, len(names))).astype(int))
    ]
    figure = _figure((12, 6.4))
    lines, maps = figure.subfigures(2, 1)
    measures = {"entropy": "entropy", "max_violation": "max violation", "dead": "dead experts"}
    for axes, (measure, label) in zip(lines.subplots(1, 3), measures.items(), strict=True):
        values = [[_measure(layer, measure) for layer in one.layers.values()] for one in history.statistics]
        lowest, highest = [min(of) for of in values], [max(of) for of in values]
        axes.fill_between(history.steps, lowest, highest, color="C0", alpha=0.2, linewidth=0, label="all layers")
        axes.plot(history.steps, [np.mean(of) for of in values], color="C0", marker=".", label="mean")
        axes.set_xlabel("step")
        axes.set_title(label)
        axes.set_ylim(bottom=0)
    axes.legend()
    all_axes = np.atleast_1d(maps.subplots(1, len(shown), sharey=True))
    for axes, name in zip(all_axes, shown, strict=True):
        # A layer for images has no load where there were none.
        loads = [one[name].load.numpy() if name in one.layers else np.empty(0) for one in history.statistics]
        image = _heat_map(axes, _relative_load(loads))
        _hatch_zero_experts(
            axes,
            [
                (len(one[name].counts), one[name].num_zero_computation_experts) if name in one.layers else (0, 0)
                for one in history.statistics
            ],
        )
        axes.set_title(f"layer {layer_number(name)}")
        every = max(1, len(history.steps) // 8)
        axes.set_yticks(range(0, len(history.steps), every), history.steps[::every])
    all_axes[0].set_ylabel("step")
    maps.colorbar(image, ax=all_axes.tolist(), label="load / even share", extend="max")
    return _finish(figure, path, title)


def plot_specialization(
    statistics: "Mapping[str, RoutingStatistics]", path: str | Path | None = None, title: str = ""
) -> "Figure":
    """
    Which experts serve which domain: of every layer a heat map, domain x expert.

    Args:
        statistics (`Mapping[str, RoutingStatistics]`): What was recorded of each domain or language.
        path (`str` or `Path`, *optional*): Where to save the picture.
        title (`str`, *optional*): A line above it.

    Returns:
        `matplotlib.figure.Figure`, in which 1 is the expert's share over all domains alike.

    Raises:
        ValueError: if there are less than two domains.
        ImportError: if matplotlib is not installed.
    """
    if len(statistics) < 2:
        raise ValueError(f"Specialization is a difference between domains; given: {', '.join(statistics) or 'none'}.")
    pictures = {}
    for name in next(iter(statistics.values())).layers:
        if any(name not in of_domain.layers for of_domain in statistics.values()):
            continue  # a layer that some domain does not reach
        loads = np.array([of_domain[name].load.numpy() for of_domain in statistics.values()])
        pictures[name] = loads / np.maximum(loads.mean(0, keepdims=True), 1e-12)
    figure, all_axes = _heat_maps(pictures, 3.2, 0.9 + 0.28 * len(statistics), "share in domain / mean share")
    for axes, name in zip(all_axes, pictures, strict=True):
        layers = [of_domain[name] for of_domain in statistics.values()]
        _hatch_zero_experts(axes, [(len(layer.counts), layer.num_zero_computation_experts) for layer in layers])
        axes.set_yticks(range(len(statistics)), list(statistics))
        axes.tick_params(labelleft=axes.get_subplotspec().is_first_col())
    return _finish(figure, path, title)


def plot_coactivation(
    coactivation: "Mapping[str, np.ndarray]",
    path: str | Path | None = None,
    title: str = "",
    statistics: "RoutingStatistics | None" = None,
) -> "Figure":
    """
    Which experts are chosen together: of every layer a heat map, expert x expert.

    Args:
        coactivation (`Mapping[str, np.ndarray]`): By router `(E, E)`: for how many tokens both were chosen, as
            [`RoutingRecorder`] counts them.
        path (`str` or `Path`, *optional*): Where to save the picture.
        title (`str`, *optional*): A line above it.
        statistics ([`RoutingStatistics`], *optional*): Of the same routers, to have zero-computation experts hatched.

    Returns:
        `matplotlib.figure.Figure`, in which 1 is what pairs would have if every expert had a weight of its own, those that make it as
        frequent as it is, and the choice of one told nothing of the others.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    pictures = {}
    for name, together in coactivation.items():
        together = np.array(together, dtype=float)
        np.fill_diagonal(together, 0)
        expected = _independent_pairs(together.sum(1))
        missing = np.full_like(together, np.nan)
        pictures[name] = np.divide(together, expected, where=expected > 0, out=missing)
    figure, all_axes = _heat_maps(pictures, 2.8, 2.6, "together / if independent")
    for axes, (name, picture) in zip(all_axes, pictures.items(), strict=True):
        if statistics is not None:
            count = statistics[name].num_zero_computation_experts
            _hatch_zero_experts(axes, [(len(picture), count)] * len(picture))
            _hatch(axes, -0.5, len(picture) - count - 0.5, len(picture) - count, count)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("expert")
    return _finish(figure, path, title)


def _independent_pairs(sums: np.ndarray) -> np.ndarray:
    """The symmetric matrix with these sums of rows that is a product of a weight of each row and column, and 0 on the diagonal."""
    weights = sums / max(np.sqrt(sums.sum()), 1e-12)
    for _ in range(1000):
        others = weights.sum() - weights
        weights = np.sqrt(weights * np.divide(sums, others, where=others > 0, out=np.zeros_like(sums)))
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    return pairs


def _measure(layer: Any, name: str) -> float:
    return len(layer.dead_experts) / len(layer.counts) if name == "dead" else getattr(layer, name)


def _relative_load(loads: list[np.ndarray]) -> np.ndarray:
    """Relative to an even share, so that 1 means balanced whatever the number of experts."""
    relative = np.full((len(loads), max(map(len, loads))), np.nan)
    for row, load in enumerate(loads):
        relative[row, : len(load)] = load * len(load)
    return relative


def _heat_map(axes: Any, values: np.ndarray) -> Any:
    num_experts = values.shape[1]
    axes.set_xlabel("expert")
    axes.set_xticks(range(0, num_experts, max(1, num_experts // 16)))
    axes.set_facecolor("0.85")  # where there is no value
    return axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")


def _hatch_zero_experts(axes: Any, rows: list[tuple[int, int]]) -> None:
    """Mark the last experts of every row that compute nothing, given by the numbers of all its experts and of these."""
    for row, (num_experts, count) in enumerate(rows):
        _hatch(axes, num_experts - count - 0.5, row - 0.5, count, 1)
    if axes.get_xlabel() and any(count for _, count in rows):
        axes.set_xlabel("expert (hatched: no computation)")


def _hatch(axes: Any, left: float, top: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    if width and height:
        axes.add_patch(Rectangle((left, top), width, height, fill=False, hatch="////", linewidth=0, edgecolor="0.35"))


def _heat_maps(
    pictures: Mapping[str, np.ndarray], width: float, height: float, label: str
) -> "tuple[Figure, list[Any]]":
    """A heat map of each layer, up to four side by side, with what the colours mean; sizes in inches."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = _figure((width * columns + 1, height * rows + 1))
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, (axes, (name, values)) in enumerate(zip(all_axes, pictures.items(), strict=False)):
        image = _heat_map(axes, values)
        axes.set_title(f"layer {layer_number(name)}", fontsize=9)
        if place + columns < len(pictures):
            axes.set_xlabel("")
    for axes in all_axes[len(pictures) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=all_axes.tolist(), label=label, extend="max", shrink=min(1, 2 / rows), anchor=(0, 1))
    return figure, all_axes[: len(pictures)].tolist()


def _label_layers(axes: Any, names: list[str]) -> None:
    step = max(1, len(names) // 30)
    axes.set_yticks(range(0, len(names), step), [layer_number(name) for name in names][::step])


def _figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install hf-moe[plots]`.") from error
    return Figure(figsize=size, layout="constrained")


def _finish(figure: "Figure", path: str | Path | None, title: str) -> "Figure":
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
