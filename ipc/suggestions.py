"""The word that was likely meant where an unknown one was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_LIKENESS: Final = 0.6
"""Two letters of three exchanged still pass; below that, what is offered has nothing to do with what was written."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Make the end of a message: ``"; did you mean status?"``, or nothing where no known word is close."""
    from difflib import get_close_matches  # slow to import, and needed only where something is wrong

    by_core = {_core(each): each for each in known}
    found = get_close_matches(_core(word), by_core, n=1, cutoff=_LIKENESS)
    return f"; did you mean {by_core[found[0]]}?" if found else ""


def _core(word: str) -> str:
    """The part that tells words apart: every flag begins with dashes, every variable with XDITD_."""
    return word.lower().lstrip("-.").removeprefix("xditd_").replace("_", "-")
