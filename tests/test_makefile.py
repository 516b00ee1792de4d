# SPDX-License-Identifier: Apache-2.0
"""What the Makefile reads in other files."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent


def versions(path: Path) -> dict[str, str]:
    """The one version that a file of constraints allows of each package."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.mark.processes
def test_oldest_versions_are_the_lower_bounds_of_pyproject(tmp_path):
    file = tmp_path / "constraints.txt"
    command = ["make", "--silent", f"OLDEST={tmp_path}", f"PYTHON={sys.executable}", str(file)]
    subprocess.run(command, cwd=ROOT, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = {}
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in ("peft", "transformers"):
            (lowest[requirement.name],) = (part.version for part in requirement.specifier if part.operator == ">=")
    assert len(lowest) == 2
    assert versions(file) == versions(ROOT / "constraints.txt") | lowest
