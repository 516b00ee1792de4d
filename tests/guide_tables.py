# SPDX-License-Identifier: Apache-2.0
"""The tables of the guide that are made from the data of tests; run this file to print them into it."""

from pathlib import Path

import exactness_matrix
import native_pairs


GUIDE = Path(__file__).parents[1] / "examples" / "guides" / "upcycling.md"
TABLES = {"exactness matrix": exactness_matrix.render, "native targets": native_pairs.render}


def place(name: str) -> tuple[str, str, str]:
    """The guide before a table, the table, and the guide behind it."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    before, rest = GUIDE.read_text(encoding="utf-8").split(begin)
    table, after = rest.split(end)
    return before + begin, table, end + after


if __name__ == "__main__":
    for name, render in TABLES.items():
        before, _, after = place(name)
        GUIDE.write_text(before + render() + after, encoding="utf-8")
