# SPDX-License-Identifier: Apache-2.0
"""What a misspelt name may have meant: `did_you_mean`."""

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(unknown: Iterable[object], known: Sequence[object]) -> str:
    """A question with the known names that are closest to the unknown ones, to end a refusal with; empty if none is close."""
    names = [str(name) for name in known]
    close = {str(name): difflib.get_close_matches(str(name), names, n=1) for name in unknown}
    found = [f"{matches[0]!r} for {name!r}" for name, matches in close.items() if matches]
    return f" Did you mean {' and '.join(found)}?" if found else ""
