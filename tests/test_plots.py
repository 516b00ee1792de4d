# SPDX-License-Identifier: Apache-2.0
"""The pictures show what was recorded."""

import json
import re

import numpy as np
import pytest
import torch

from hf_moe.plots import plot_coactivation, plot_history, plot_load, plot_specialization
from hf_moe.token_page import routing_page
from hf_moe.training.history import RoutingHistory
from hf_moe.training.statistics import LayerRouting, RoutingStatistics


def test_heat_map_shows_load_and_entropy(tmp_path):
    layers = {
        "model.layers.1.mlp.gate": LayerRouting(torch.tensor([2, 6]), 4),
        "model.layers.3.mlp.gate": LayerRouting(torch.tensor([1, 1, 1, 1]), 2),
    }
    figure = plot_load(RoutingStatistics(layers), tmp_path / "load.png", title="tiny")
    heat, bars = figure.axes[0], figure.axes[1]
    np.testing.assert_allclose(heat.images[0].get_array().filled(np.nan), [[0.5, 1.5, np.nan, np.nan], [1, 1, 1, 1]])
    assert [label.get_text() for label in heat.get_yticklabels()] == ["1", "3"]
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx([layers["model.layers.1.mlp.gate"].entropy, 1.0])
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def statistics(*counts: list[int]) -> RoutingStatistics:
    """One layer of each list, every other one of the model."""
    layers = {
        f"model.layers.{2 * place}.mlp.gate": LayerRouting(torch.tensor(of), sum(of))
        for place, of in enumerate(counts)
    }
    return RoutingStatistics(layers)


def values(axes) -> np.ndarray:
    return axes.images[0].get_array().filled(np.nan)


def test_history_over_steps(tmp_path):
    history = RoutingHistory([10, 20], [statistics([4, 0], [2, 2]), statistics([3, 1], [1, 3])])
    figure = plot_history(history, tmp_path / "history.png", title="tiny")
    entropy, violation, dead, first, second, _ = figure.axes
    assert [axes.get_title() for axes in (entropy, violation, dead)] == ["entropy", "max violation", "dead experts"]
    np.testing.assert_allclose(violation.lines[0].get_xydata(), [[10, 0.5], [20, 0.5]])
    np.testing.assert_allclose(dead.lines[0].get_xydata(), [[10, 0.25], [20, 0]])
    assert (first.get_title(), second.get_title()) == ("layer 0", "layer 2")
    np.testing.assert_allclose(values(first), [[2, 0], [1.5, 0.5]])
    np.testing.assert_allclose(values(second), [[1, 1], [0.5, 1.5]])
    assert [label.get_text() for label in first.get_yticklabels()] == ["10", "20"]
    assert (tmp_path / "history.png").is_file()
    with pytest.raises(ValueError, match="The history is empty"):
        plot_history(RoutingHistory([], []))


def test_specialization_is_relative_to_the_mean_of_domains(tmp_path):
    by_domain = {"code": statistics([3, 1], [2, 2]), "prose": statistics([1, 3], [20, 20])}
    figure = plot_specialization(by_domain, tmp_path / "domains.png")
    np.testing.assert_allclose(values(figure.axes[0]), [[1.5, 0.5], [0.5, 1.5]])
    np.testing.assert_allclose(values(figure.axes[1]), [[1, 1], [1, 1]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["code", "prose"]
    with pytest.raises(ValueError, match="a difference between domains; given: code"):
        plot_specialization({"code": by_domain["code"]})


def test_coactivation_of_independent_experts_is_one(tmp_path):
    """Experts 0 and 1 are always together; 2 and 3 with everybody alike."""
    together = np.array([[10, 10, 0], [10, 10, 0], [0, 0, 0]])
    figure = plot_coactivation({"model.layers.0.mlp.gate": together}, tmp_path / "pairs.png")
    np.testing.assert_allclose(values(figure.axes[0]), [[np.nan, 1, np.nan], [1, np.nan, np.nan], [np.nan] * 3])
    alike = np.full((4, 4), 5.0) + 10 * np.eye(4)
    figure = plot_coactivation({"model.layers.0.mlp.gate": alike})
    np.testing.assert_allclose(values(figure.axes[0]), np.where(np.eye(4) > 0, np.nan, 1))


def test_coactivation_of_experts_of_unequal_load_is_one_too():
    """Two of four by chance, one of them seven times as likely as the others: what chance alone makes of pairs is no pattern."""
    generator = np.random.default_rng(0)
    scores = np.log([0.1, 0.1, 0.1, 0.7]) + generator.gumbel(size=(100_000, 4))
    together = np.zeros((4, 4))
    for first, second in (both := np.argsort(-scores, axis=1)[:, :2]):
        together[[first, second], [second, first]] += 1
    together += np.diag(np.bincount(both.ravel(), minlength=4))
    figure = plot_coactivation({"model.layers.0.mlp.gate": together})
    found = values(figure.axes[0])
    np.testing.assert_allclose(found[~np.eye(4, dtype=bool)], 1, atol=0.05)


def test_zero_computation_experts_are_hatched(tmp_path):
    """In layers of different numbers of experts each for itself; the axis says what it means, but where there are none."""
    names = [f"layers.{index}.mlp" for index in range(2)]
    of = RoutingStatistics(
        {
            names[0]: LayerRouting(torch.tensor([4, 4, 2, 2]), 6, num_zero_computation_experts=1),
            names[1]: LayerRouting(torch.tensor([4, 4, 4]), 6, num_zero_computation_experts=1),
        }
    )
    RoutingHistory.begin(tmp_path, 0)
    for step in (1, 2):
        RoutingHistory.append(tmp_path, step, of)
    history = RoutingHistory.load(tmp_path)
    pairs = {name: np.ones((len(of[name].counts),) * 2) for name in names}
    for figure, places in (
        (plot_load(of), [{(2.5, -0.5), (1.5, 0.5)}]),
        (plot_history(history), [{(2.5, -0.5), (2.5, 0.5)}, {(1.5, -0.5), (1.5, 0.5)}]),
        (plot_specialization({"a": of, "b": of}), [{(2.5, -0.5), (2.5, 0.5)}, {(1.5, -0.5), (1.5, 0.5)}]),
        (plot_coactivation(pairs, statistics=of), [{(2.5, index - 0.5) for index in range(4)} | {(-0.5, 2.5)}]),
    ):
        maps = [axes for axes in figure.get_axes() if axes.images]
        for axes, expected in zip(maps, places, strict=False):
            assert {patch.get_xy() for patch in axes.patches} == expected
            assert axes.get_xlabel() == "expert (hatched: no computation)"
    plain = plot_load(statistics([1, 2])).get_axes()[0]
    assert (len(plain.patches), plain.get_xlabel()) == (0, "expert")


def test_the_page_holds_tokens_and_choices(tmp_path):
    tokens = ["<b>", " and", "</script>\n"]
    choices = {"model.layers.4.mlp.gate": torch.tensor([[0, 1], [2, 0], [1, 3]])}
    page = routing_page(tokens, choices, 3, tmp_path / "page.html", title="a < b")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "<span>&lt;b&gt;</span><span> and</span><span>&lt;/script&gt;\n</span>" in page
    assert "<title>a &lt; b</title>" in page
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    assert json.loads(data) == {"numExperts": 3, "names": ["layer 4"], "choices": [[[0, 1], [2, 0], [1, 3]]]}
    with pytest.raises(ValueError, match="There are 2 tokens, and choices of 3 in model.layers.4.mlp.gate"):
        routing_page(tokens[:2], choices, 3)
