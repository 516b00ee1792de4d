# SPDX-License-Identifier: Apache-2.0
"""`add_routing_section`: which experts serve which text, as a section with pictures in a model's card."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import plot_history, plot_load, plot_specialization
from ..training.statistics import RoutingStatistics


if TYPE_CHECKING:
    from ..training.history import RoutingHistory


BEGIN, END = "<!-- routing: begin -->", "<!-- routing: end -->"
PICTURES = ("load.png", "domains.png", "history.png")


def add_routing_section(
    folder: str | Path,
    texts: Mapping[str, RoutingStatistics],
    history: "RoutingHistory | None" = None,
    note: str | None = None,
) -> None:
    """
    Write a section on routing into the `README.md` of a model's folder, and its pictures into `routing/` beside it.

    A section from before is replaced; the rest of the card stays as it is.

    Args:
        folder (`str` or `Path`): The model's folder, with a card.
        texts (`Mapping[str, RoutingStatistics]`): What was recorded of each text or domain.
        history ([`RoutingHistory`], *optional*): What a [`RouterStatisticsCallback`] wrote in the model's training.
        note (`str`, *optional*): What the texts were taken as, where that decides which experts could serve them.

    Raises:
        ValueError: if there is no card, the marks of the section in it are broken, or the history is empty.
        ImportError: if matplotlib is not installed.
    """
    before, after = split_card(folder)
    pictures = {"load.png": plot_load(RoutingStatistics.sum(texts.values()))}
    lines = [
        BEGIN,
        "## Routing",
        "",
        "Means over layers. Entropy of the load by its maximum: 1 if all experts get the same. Max violation: slots of the busiest",
        "expert by the mean, minus 1.",
        *(["", note] if note is not None else []),
        "",
        *_table(texts),
        "",
        "![Load of every layer's experts](routing/load.png)",
    ]
    if len(texts) > 1:
        pictures["domains.png"] = plot_specialization(texts)
        lines += [
            "",
            "Which experts serve which text:",
            "",
            "![Share of each text in every expert](routing/domains.png)",
        ]
    if history is not None:
        pictures["history.png"] = plot_history(history)
        lines += ["", "How the load changed in training:", "", "![Load over the steps](routing/history.png)"]
    Path(folder, "routing").mkdir(exist_ok=True)
    for name in PICTURES:
        path = Path(folder, "routing", name)
        if name in pictures:
            pictures[name].savefig(path, dpi=150)
        else:
            path.unlink(missing_ok=True)
    text = "\n".join([before.rstrip(), "", *lines, END, "", after.strip()]).rstrip() + "\n"
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def split_card(folder: str | Path) -> tuple[str, str]:
    """
    What stands before and after the section on routing in a card.

    Raises:
        ValueError: if there is no card, or the marks of the section in it are broken.
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no README.md to write a section into. `hf-moe upcycle` writes one, and so does "
            "`trainer.create_model_card()`."
        )
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    between, end, after = rest.partition(END)
    if bool(begin) != bool(end) or END in before or BEGIN in between + after or END in after:
        raise ValueError(
            f"{path} should have the lines {BEGIN} and {END} once, in this order, or none of them. Delete those that are there."
        )
    return before, after


def _table(texts: Mapping[str, RoutingStatistics]) -> list[str]:
    """A row for each text; columns of what was served where it is not all that there is to serve."""
    layers = [layer for statistics in texts.values() for layer in statistics.layers.values()]
    experts_per_token = {layer.experts_per_token for layer in layers}
    varies = len(experts_per_token) > 1 or any(value % 1 for value in experts_per_token)
    has_dropped = any(layer.num_dropped for layer in layers)
    has_no_computation = any(layer.num_zero_computation_experts for layer in layers)
    columns = {
        "entropy": ("entropy", ".3f", True),
        "max violation": ("max_violation", ".3f", True),
        "dead experts": ("dead_fraction", ".1%", True),
        "experts per token": ("experts_per_token", ".2f", varies),
        "dropped": ("dropped_fraction", ".1%", has_dropped),
        "no computation": ("zero_computation_fraction", ".1%", has_no_computation),
    }
    columns = {title: column for title, column in columns.items() if column[2]}
    rows = [["text", "tokens", *columns], ["---"] * (2 + len(columns))]
    for name, statistics in texts.items():
        summary = statistics.summary()
        num_tokens = max(layer.num_tokens for layer in statistics.layers.values())
        figures = [format(summary[key], spec) for key, spec, _ in columns.values()]
        rows.append([name.replace("|", "\\|"), f"{num_tokens:,}", *figures])
    return [f"| {' | '.join(row)} |" for row in rows]
