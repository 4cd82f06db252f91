"""Output of the worker processes: copied from their pipe to the log, and searched for why they ended."""

from __future__ import annotations

import os
from typing import Final

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.log_buffer import LogBuffer
from xditd.ipc.processes import describe_exit
from xditd.ipc.worker_messages import CONFIGURATION_STATUS, UNEXPLAINED, VERDICT_PREFIX

_READ_BYTES: Final = 64 * 1024
_TRACEBACK: Final = "Traceback (most recent call last):"
_FINAL_STATUSES: Final = (CONFIGURATION_STATUS, 126, 127)
"""126 and 127 are a shell's, for a program that it cannot run or cannot find."""
_NO_MODULE: Final = "No module named"
"""In the last line of ``python -m`` when the leader's package is not installed."""


class WorkerOutput:
    """Read ``descriptor``, which it owns, until :meth:`close`, and keep the lines that explain the processes' end."""

    def __init__(self, loop: EventLoop, log_buffer: LogBuffer, descriptor: int) -> None:
        self._loop = loop
        self._log_buffer = log_buffer
        self._descriptor = descriptor
        self._partial = b""
        self._is_in_traceback = False
        self.cause = ""
        """Why the group ended, as the leader printed it."""
        self.last_error = ""
        """The last line of the last traceback."""
        self.last_line = ""
        """The last line that was not empty."""
        os.set_blocking(descriptor, False)
        loop.watch(descriptor, self._on_readable)

    def explain(self, status: int) -> str:
        """Say why the group ended: the leader's own line, else its exit status and the last line of output."""
        if self.cause:
            is_known = UNEXPLAINED not in self.cause or not self.last_error
            return self.cause if is_known else f"{self.cause}; last error: {self.last_error}"
        if status == CONFIGURATION_STATUS and self.last_line:
            return self.last_line  # of argparse, or of another program in the leader's place
        if status == 0:
            return "the group's leader exited without being told to (exit status 0)"
        # After a signal, an earlier traceback is not the cause.
        last = (self.last_error if status > 0 else "") or self.last_line or "no output"
        return f"the group's leader {describe_exit(status)}: {last}"

    @property
    def has_cause(self) -> bool:
        """Whether the leader has named the cause of a rank's end."""
        return bool(self.cause) and UNEXPLAINED not in self.cause

    def is_final(self, status: int) -> bool:
        """Return whether a restart would fail the same way: wrong configuration, or the program cannot be run."""
        return status in _FINAL_STATUSES or (status == 1 and not self.cause and _NO_MODULE in self.last_line)

    def close(self) -> None:
        """Read the rest of the pipe, which has the cause of an exit, and close it."""
        while self._read_some():
            pass
        self._keep(self._partial)
        self._loop.unwatch(self._descriptor)
        os.close(self._descriptor)

    def _on_readable(self) -> None:
        if self._read_some() == b"":
            self._loop.unwatch(self._descriptor)

    def _read_some(self) -> bytes | None:
        """Read one piece; ``None`` when the pipe is empty, ``b""`` at its end."""
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
        if not text:
            return
        self.last_line = text
        if text.startswith(VERDICT_PREFIX):
            self.cause = text.removeprefix(VERDICT_PREFIX)
        if text.startswith(_TRACEBACK):
            self._is_in_traceback = True
        elif self._is_in_traceback and not text[0].isspace():
            self._is_in_traceback, self.last_error = False, text
        self._log_buffer.add_output(text)
