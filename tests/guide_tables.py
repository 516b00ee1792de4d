# SPDX-License-Identifier: Apache-2.0
"""The tables of the guide that are made from the data of tests; run this file to print them into it."""

import sys
from pathlib import Path

import exactness_matrix
import native_pairs
import router_table


sys.path.append(str(Path(__file__).parent / "training"))
import router_gradients


GUIDES = Path(__file__).parents[1] / "examples" / "guides"
TABLES = {
    "exactness matrix": ("upcycling.md", exactness_matrix.render),
    "native targets": ("upcycling.md", native_pairs.render),
    "balance in every setting": ("balance.md", router_gradients.render),
    "routers": ("routers.md", router_table.render),
    "routers in training": ("routers.md", router_table.render_training),
    "capacity policies": ("routers.md", router_table.render_policies),
}


def place(name: str) -> tuple[str, str, str]:
    """The guide before a table, the table, and the guide behind it."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    before, rest = (GUIDES / TABLES[name][0]).read_text(encoding="utf-8").split(begin)
    table, after = rest.split(end)
    return before + begin, table, end + after


if __name__ == "__main__":
    for name, (guide, render) in TABLES.items():
        before, _, after = place(name)
        (GUIDES / guide).write_text(before + render() + after, encoding="utf-8")
