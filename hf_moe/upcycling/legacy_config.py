# SPDX-License-Identifier: Apache-2.0
"""
Keys of config.json that other readers look for and transformers 5 no longer writes.

Releases 4 of transformers, and the converters and servers that were written against them, expect `rope_theta` and
`rope_scaling` beside the other fields, `torch_dtype`, and the number of experts under the name that the class had first.
transformers 5 reads such a file as the same configuration.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


def add_legacy_keys(path: Path, config: PreTrainedConfig) -> None:
    """Add to the config.json at `path` the keys of [`legacy_keys`] that it has not."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {**legacy_keys(values, config), **values}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def legacy_keys(values: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """
    What older readers call some of the `values` of a config.json.

    Args:
        values (`dict`): The config.json that transformers wrote.
        config ([`~transformers.PreTrainedConfig`]): What it was written from.
    """
    keys = {alias: values[name] for alias, name in config.attribute_map.items() if name in values}
    keys["torch_dtype"] = values["dtype"]
    rope = values["rope_parameters"]
    if "rope_theta" not in rope:  # one set for each type of layer, which nothing before transformers 5 knew
        return keys
    keys["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        elsewhere = ("rope_theta", "partial_rotary_factor")
        keys["rope_scaling"] = {name: value for name, value in rope.items() if name not in elsewhere}
    return keys
