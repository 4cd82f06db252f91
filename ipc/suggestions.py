"""Suggest the closest known word for an unknown one ("did you mean ...?")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_LIKENESS: Final = 0.6
"""difflib's cutoff: two exchanged letters of three still match; below that, suggestions are unrelated."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message: ``"; did you mean status?"``, or nothing if no known word is close."""
    from difflib import get_close_matches  # slow to import, and needed only for errors

    by_stripped = {_strip_prefix(each): each for each in known}
    found = get_close_matches(_strip_prefix(word), by_stripped, n=1, cutoff=_LIKENESS)
    return f"; did you mean {by_stripped[found[0]]}?" if found else ""


def _strip_prefix(word: str) -> str:
    """Remove what all flags (dashes) and all variables (XDITD_) begin with."""
    return word.lower().lstrip("-.").removeprefix("xditd_").replace("_", "-")
