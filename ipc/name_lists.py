"""Lists of names in error messages: the message shows the first few and the count, the error carries all.

A checkpoint of another format differs in hundreds of tensors, which would hide the cause and the remedy. So every list
whose length depends on the input is formatted by :func:`listed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from xditd.ipc import limits

SHOWN: Final = 5
"""Names in one list of a message."""

_SHOWN_CHARS: Final = 120
SENTENCE_CHARS: Final = 400
"""The same for sentences, which name tensors and say what is wrong with them."""
_LOG_LINE_CHARS: Final = 1_600
"""Less than the daemon keeps of a log line."""


def listed(names: Iterable[object], *, joint: str = ", ", chars: int = _SHOWN_CHARS) -> str:
    """Join the first names, each cut to ``chars``, and count the others: ``a, b, c, d, e and 775 more``."""
    every = [str(name) for name in names]
    shown = joint.join(_cut(name, chars) for name in every[:SHOWN])
    return f"{shown} and {len(every) - SHOWN} more" if len(every) > SHOWN else shown


def in_log_lines(names: Iterable[str]) -> Iterator[str]:
    """Join all names by commas, in lines that the log does not cut."""
    line = ""
    for name in names:
        name = _cut(name, limits.MAX_ERROR_NAME_CHARS)
        if line and len(line) + len(name) > _LOG_LINE_CHARS:
            yield line
            line = ""
        line = f"{line}, {name}" if line else name
    if line:
        yield line


def for_message(names: Iterable[str]) -> tuple[str, ...]:
    """Cut a list to what a ``Failed`` message holds, which is more than most checkpoints have tensors."""
    found: list[str] = []
    room = limits.MAX_ERROR_NAMES_CHARS
    for name in names:
        name = _cut(name, limits.MAX_ERROR_NAME_CHARS)
        room -= len(name)
        if room < 0 or len(found) == limits.MAX_ERROR_NAMES:
            break
        found.append(name)
    return tuple(found)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
