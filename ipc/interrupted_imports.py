"""Ctrl-C while a program imports its own modules: it ends at once, without a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Final

INTERRUPTED: Final = 130
"""128 + SIGINT, as a shell reports a program that Ctrl-C ended."""


@contextlib.contextmanager
def interrupts_end_process() -> Iterator[None]:
    """End the process with :data:`INTERRUPTED` at a SIGINT, where Python's own handler would raise an exception.

    Modules that are being imported have nothing to clean up, and some C code drops exceptions.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a shell ignores it for its background jobs
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
