# SPDX-License-Identifier: Apache-2.0
"""Imports follow the layering; files that travel to the Hub import each other in the one way that survives it."""

import ast
import re
from pathlib import Path

import pytest

from hf_moe.registration import FAMILIES


PACKAGE = Path(__file__).parent.parent / "hf_moe"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "models": set(),
    "upcycling": {"models", "training", "hub", "version"},
    "editing": {"upcycling", "models", "training", "hub", "version"},
    "training": {"models", "plots"},
    "adapters": {"models", "training"},
    "hub": {"training", "plots"},
    "metrics": {"training"},
    "plots": {"training"},
    "token_page": {"training"},
    "registration": {"models"},
    "version": set(),
    "cli": {"adapters", "upcycling", "editing", "training", "hub", "plots", "token_page", "models"},
    "__init__": {"registration", "version"},
}


def imported_parts(path: Path) -> set[str]:
    """The parts of hf_moe, one level below the package, that a module imports."""
    parts = set()
    package = ["hf_moe", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            if module == "hf_moe":
                parts.add("__init__")  # the root imports everything else when asked
        parts |= {name.split(".")[1] for name in names if name.startswith("hf_moe.")}
    known = {part.stem for part in PACKAGE.iterdir()} | {"__init__"}
    return parts & known


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_parts(path) <= MAY_IMPORT[part] | {part}


def test_the_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr("test_layering.PACKAGE", tmp_path)
    for part in ("hub", "models", "cli", "training"):
        (tmp_path / part).mkdir()
    source = tmp_path / "hub" / "card.py"
    source.write_text(
        "import hf_moe.models\nfrom ..cli import main\ndef f():\n    from hf_moe.training import x\nfrom .. import y"
    )
    assert imported_parts(source) == {"models", "cli", "training", "__init__"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_models_import_siblings_by_name_only(path):
    text = path.read_text()
    # transformers finds the files to publish with a regular expression, which docstrings can trip as well.
    for line in re.findall(r"^\s*(?:from\s+\.\S*|import\s+\.\S*).*$", text, flags=re.MULTILINE):
        assert re.fullmatch(r"from \.[a-z0-9_]+ import .*", line.lstrip("\n")), line
    assert "import hf_moe" not in re.sub(r">>> .*", "", text)
    assert not (path.name != "__init__.py" and re.search(r"^from hf_moe", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_open_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path


def test_files_stay_readable():
    assert {str(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > 400} == {}


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank, nor a comment, nor of a docstring."""
    text = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(number not in documented and bool(line.split("#")[0].strip()) for number, line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_under_60_lines_of_code(family):
    files = [PACKAGE / "models" / f"{kind}_moe_{family}.py" for kind in ("configuration", "modeling")]
    assert sum(map(lines_of_code, files)) < 60
