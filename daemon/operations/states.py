"""State transitions: one function that checks a move against a table of allowed ones."""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from typing import TypeVar

from xditd.ipc.errors import Internal

S = TypeVar("S", bound=Enum)


def move(table: Mapping[S, Set[S]], now: S, to: S) -> S:
    """Return ``to`` if the table allows the move from ``now``, else raise ``Internal``."""
    if to not in table[now]:
        raise Internal(f"{type(now).__name__} may not move from {now.value} to {to.value}")
    return to
