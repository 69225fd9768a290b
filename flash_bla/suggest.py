"""The nearest valid name, for error messages; it stands under all floors and imports none."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest valid one, or the valid ones if none is near."""
    valid = sorted(valid)
    nearest = get_close_matches(str(name), valid, n=1)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; valid are {', '.join(valid)}" if len(valid) <= 50 else ""
