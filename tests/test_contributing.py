# SPDX-License-Identifier: Apache-2.0
"""The examples in the contributing guide are the code itself."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_examples_are_the_files_they_name():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    examples = re.findall(r"^```python\n# (hf_moe/\S+)\n(.*?)^```$", guide, flags=re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    for path, example in examples:
        assert example in (ROOT / path).read_text(), path
