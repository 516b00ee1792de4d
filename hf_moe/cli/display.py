# SPDX-License-Identifier: Apache-2.0
"""Numbers as people and as programs want them."""

from huggingface_hub.cli import out


def count(number: int) -> str | int:
    """With separators for people, plain for programs."""
    return f"{number:,}" if out.mode == "human" else number


def error(value: float | None) -> str | float | None:
    """With two digits for people, in full for programs."""
    return f"{value:.1e}" if out.mode == "human" and value is not None else value
