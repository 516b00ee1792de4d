# SPDX-License-Identifier: Apache-2.0
"""The pictures show what was recorded."""

import numpy as np
import pytest
import torch

from hf_moe.plots import plot_load
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
