"""What the worker processes print: one pipe, line by line into the log."""

from __future__ import annotations

import os
from typing import Final

from xditd.daemon.logbook import Logbook
from xditd.daemon.loop import Loop

_READ_BYTES: Final = 64 * 1024


class WorkerOutput:
    """Read ``descriptor`` (and own it) until :meth:`close`; ``last_line`` is the last one that was not empty."""

    def __init__(self, loop: Loop, logbook: Logbook, descriptor: int) -> None:
        self._loop = loop
        self._logbook = logbook
        self._descriptor = descriptor
        self._partial = b""
        self.last_line = ""
        os.set_blocking(descriptor, False)
        loop.watch(descriptor, self._on_readable)

    def close(self) -> None:
        """Read what the pipe still holds, and close it. The reason for an exit is its last line."""
        while self._read_some():
            pass
        self._keep(self._partial)
        self._loop.unwatch(self._descriptor)
        os.close(self._descriptor)

    def _on_readable(self) -> None:
        if self._read_some() == b"":
            self._loop.unwatch(self._descriptor)

    def _read_some(self) -> bytes | None:
        """Read one piece; ``None`` when there is nothing now, empty when there will be nothing any more."""
        try:
            piece = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return None
        *lines, self._partial = (self._partial + piece).split(b"\n")
        if len(self._partial) > _READ_BYTES:  # a line without end must not fill the memory
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            self._keep(line)
        return piece

    def _keep(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            self.last_line = text
            self._logbook.add(text)
