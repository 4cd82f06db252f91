"""Standard error as a place that may be full, closed, or read by nobody: lines are written without ever waiting."""

from __future__ import annotations

import contextlib
import select
from typing import Final, TextIO

_PIECE_BYTES: Final = 4_000
"""A pipe that is writable at all takes 4,096 without waiting (pipe(7), PIPE_BUF)."""

_ESCAPED_BYTES: Final = 10
"""Of one letter that the stream's encoding lacks (``\\U0001f600``); ASCII is in every encoding."""


class LogStream:
    """Write lines to ``stream``. One that takes nothing loses lines, and is told how many when it takes some again.

    A terminal that is held (Ctrl-S) or a pager that is stopped would hold the daemon, and with it every client.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = 0
        self._poll: select.poll | None = None
        with contextlib.suppress(OSError, ValueError):  # no descriptor: memory
            descriptor = stream.fileno()
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    def write_line(self, line: str) -> None:
        text = line + "\n"
        if self._lost:
            text = f"({self._lost} lines were not written: nobody read them; xditd logs has the last ones)\n{text}"
        # A closed pipe at the other end, or a full disk, is no reason to end: the lines stay readable from memory.
        with contextlib.suppress(OSError):
            chars = _PIECE_BYTES if text.isascii() else _PIECE_BYTES // _ESCAPED_BYTES
            for start in range(0, len(text), chars):
                if self._poll is not None and not self._poll.poll(0):
                    self._lost += 1
                    return
                self._stream.write(text[start : start + chars])
                self._stream.flush()
            self._lost = 0
