# SPDX-License-Identifier: Apache-2.0
"""The section on routing in a card: its figures, its pictures, and what it leaves as it was."""

import pytest
import torch
from PIL import Image

from hf_moe import RoutingHistory
from hf_moe.hub.routing_section import add_routing_section
from hf_moe.training.statistics import LayerRouting, RoutingStatistics


def statistics(*counts: list[int]) -> RoutingStatistics:
    layers = enumerate(counts)
    return RoutingStatistics({f"layers.{at}": LayerRouting(torch.tensor(of), sum(of) // 2) for at, of in layers})


CODE, LAW = statistics([4, 4, 0, 0], [2, 2, 2, 2]), statistics([1, 1, 3, 3], [2, 2, 2, 2])
CARD = "---\nlicense: mit\n---\n\n# A model\n\nSome words.\n"


def test_figures_and_pictures(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    add_routing_section(tmp_path, {"code": CODE, "a|b": LAW}, RoutingHistory([1, 2], [CODE, LAW]))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(CARD)
    # Entropies 1/2 and 1, max violations 1 and 0; two of eight experts are dead.
    assert "| code | 4 | 0.750 | 0.500 | 25.0% |" in text
    assert "| a\\|b | 4 |" in text
    for name in ("load", "domains", "history"):
        assert f"(routing/{name}.png)" in text
        with Image.open(tmp_path / "routing" / f"{name}.png") as picture:
            assert picture.width > 300


def test_what_was_measured_and_what_was_served(tmp_path):
    """The note, and the columns that only some models need: means over layers of 1.5 and 2 experts, 1/4 and 0 dropped."""
    (tmp_path / "README.md").write_text(CARD)
    first = LayerRouting(torch.tensor([2, 1, 3]), 4, num_zero_computation_experts=1, demand=torch.tensor([4, 1, 3]))
    second = LayerRouting(torch.tensor([4, 2, 2]), 4, num_zero_computation_experts=1)
    add_routing_section(
        tmp_path, {"code": RoutingStatistics({"layers.0": first, "layers.1": second})}, note="Taken as text."
    )
    text = (tmp_path / "README.md").read_text()
    assert "\n\nTaken as text.\n\n| text |" in text
    assert "| dead experts | experts per token | dropped | no computation |\n| --- |" in text
    assert "| 0.0% | 1.75 | 12.5% | 37.5% |" in text
    add_routing_section(tmp_path, {"code": CODE})
    text = (tmp_path / "README.md").read_text()
    assert "Taken as text" not in text
    assert "| text | tokens | entropy | max violation | dead experts |\n" in text


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    add_routing_section(tmp_path, {"code": CODE, "law": LAW}, RoutingHistory([1, 2], [CODE, LAW]))
    first = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(first + "\n## More\n\nof it\n")
    add_routing_section(tmp_path, {"law": LAW})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(CARD)
    assert text.endswith("<!-- routing: end -->\n\n## More\n\nof it\n")
    assert text.count("## Routing") == 1
    assert "code" not in text
    assert "domains.png" not in text
    assert [path.name for path in (tmp_path / "routing").iterdir()] == ["load.png"]
    add_routing_section(tmp_path, {"law": LAW})
    assert (tmp_path / "README.md").read_text() == text


def test_what_cannot_be_drawn_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    add_routing_section(tmp_path, {"code": CODE, "law": LAW})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match="The history is empty"):
        add_routing_section(tmp_path, {"law": LAW}, RoutingHistory([], []))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "has no README.md to write a section into"),
        ("a <!-- routing: begin --> b", "Delete those that are there"),
        ("<!-- routing: end --> a <!-- routing: begin -->", "Delete those that are there"),
        ("<!-- routing: begin --><!-- routing: end --><!-- routing: begin -->", "Delete those that are there"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(tmp_path, card, message):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        add_routing_section(tmp_path, {"code": CODE})
    assert not (tmp_path / "routing").exists()
    assert card is None or (tmp_path / "README.md").read_text() == card
