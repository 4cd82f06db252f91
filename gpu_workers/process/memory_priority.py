"""Which process the kernel ends when host memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ADJUSTMENT: Final = Path("/proc/self/oom_score_adj")
_FIRST: Final = "1000"


@contextlib.contextmanager
def ended_first() -> Iterator[None]:
    """Have the kernel end this process before any other while the body runs, and as before afterwards.

    Where the kernel refuses, nothing changes. Source: proc(5), /proc/pid/oom_score_adj: without privileges it can be
    raised, and lowered to the least value that a privileged process has set.
    """
    before = ""
    with contextlib.suppress(OSError):
        before = _ADJUSTMENT.read_text()
        _ADJUSTMENT.write_text(_FIRST)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _ADJUSTMENT.write_text(before)
