"""What the worker processes print: one pipe, line by line into the log."""

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
"""126 and 127 are a shell's for a program that it cannot run, or find."""
_NO_MODULE: Final = "No module named"
"""How ``python -m`` ends where the leader itself is not installed."""


class WorkerOutput:
    """Read ``descriptor`` (and own it) until :meth:`close`, and keep what tells why the processes ended."""

    def __init__(self, loop: EventLoop, log_buffer: LogBuffer, descriptor: int) -> None:
        self._loop = loop
        self._log_buffer = log_buffer
        self._descriptor = descriptor
        self._partial = b""
        self._is_in_traceback = False
        self.verdict = ""
        """What the leader says of the group's end."""
        self.last_error = ""
        """The last line of the last traceback: the error that a process did not handle."""
        self.last_line = ""
        """The last line that was not empty."""
        os.set_blocking(descriptor, False)
        loop.watch(descriptor, self._on_readable)

    def explain(self, status: int) -> str:
        """Say why the group has ended by itself: in the leader's words, else by how it ended and what came last."""
        if self.verdict:
            is_known = UNEXPLAINED not in self.verdict or not self.last_error
            return self.verdict if is_known else f"{self.verdict}; last error: {self.last_error}"
        if status == CONFIGURATION_STATUS and self.last_line:
            return self.last_line  # what argparse says, or another program in the leader's place
        if status == 0:
            return "the group's leader left without being told to (exit status 0)"
        # An error that was handled earlier is not what killed it.
        last = (self.last_error if status > 0 else "") or self.last_line or "no output"
        return f"the group's leader {describe_exit(status)}: {last}"

    @property
    def has_cause(self) -> bool:
        """Whether the leader has said what ended a rank."""
        return bool(self.verdict) and UNEXPLAINED not in self.verdict

    def is_final(self, status: int) -> bool:
        """Say whether no restart can help: the leader, a shell or the interpreter said so."""
        return status in _FINAL_STATUSES or (status == 1 and not self.verdict and _NO_MODULE in self.last_line)

    def close(self) -> None:
        """Read what the pipe still holds, and close it: the reason for an exit comes last."""
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
        if not text:
            return
        self.last_line = text
        if text.startswith(VERDICT_PREFIX):
            self.verdict = text.removeprefix(VERDICT_PREFIX)
        if text.startswith(_TRACEBACK):
            self._is_in_traceback = True
        elif self._is_in_traceback and not text[0].isspace():
            self._is_in_traceback, self.last_error = False, text
        self._log_buffer.add_output(text)
