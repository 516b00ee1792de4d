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
    folder: str | Path, texts: Mapping[str, RoutingStatistics], history: "RoutingHistory | None" = None
) -> None:
    """
    Write a section on routing into the `README.md` of a model's folder, and its pictures into `routing/` beside it.

    A section from before is replaced; the rest of the card stays as it is.

    Args:
        folder (`str` or `Path`): The model's folder, with a card.
        texts (`Mapping[str, RoutingStatistics]`): What was recorded of each text or domain.
        history ([`RoutingHistory`], *optional*): What a [`RouterStatisticsCallback`] wrote in the model's training.

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
        "",
        "| text | tokens | entropy | max violation | dead experts |",
        "|---|---|---|---|---|",
        *(_row(name, statistics) for name, statistics in texts.items()),
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


def _row(name: str, statistics: RoutingStatistics) -> str:
    summary = statistics.summary()
    num_tokens = max(layer.num_tokens for layer in statistics.layers.values())
    name = name.replace("|", "\\|")
    return (
        f"| {name} | {num_tokens:,} | {summary['entropy']:.3f} | {summary['max_violation']:.3f} | "
        f"{summary['dead_fraction']:.1%} |"
    )
