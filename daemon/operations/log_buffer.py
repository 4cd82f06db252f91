"""The log: written to standard error without blocking, with the last lines kept in memory for ``xditd logs``."""

from __future__ import annotations

import contextlib
import logging
import select
import sys
import time
from collections import deque
from enum import Enum
from typing import Final, TextIO

from xditd.ipc import limits
from xditd.ipc.worker_messages import VERDICT_PREFIX

MAX_LINE_CHARS: Final = 2_000
MAX_ANSWER_CHARS: Final = 256 * 1024
"""In one ``LogLines`` reply: what a client that asks without reading can make the daemon hold, for each request."""


class Category(Enum):
    """Categories of log lines, kept apart so that none replaces another; the value is how many lines are kept."""

    DAEMON = 200
    """The daemon's states: listening, workers starting, ready, given up, stopping."""
    WARNINGS = 400
    REQUESTS = 900
    """Requests of clients, and everything else at INFO and below."""
    WORKERS = 500
    """Output of the workers, but for warnings and errors."""


assert sum(category.value for category in Category) == limits.MAX_LOG_LINES

_DAEMON_LOGGERS: Final = frozenset(
    {"xditd.daemon", "xditd.daemon.front.service", "xditd.daemon.groups.worker_group", "xditd.daemon.reload"}
)
"""Loggers that write a few lines in a day."""

_WORKER_WARNINGS: Final = ("WARNING ", "ERROR ", "CRITICAL ", VERDICT_PREFIX)
"""How warnings and errors of the leader and the ranks begin."""

_PIECE_BYTES: Final = 4_000
"""A writable pipe takes 4,096 bytes without blocking (pipe(7), PIPE_BUF)."""

_ESCAPED_BYTES: Final = 10
"""Bytes of a character that the stream's encoding lacks, as it is escaped (``\\U0001f600``)."""

_TIME: Final = "%Y-%m-%d %H:%M:%S"


class LogStream:
    """Write lines to ``stream`` without blocking. Lines that it does not take are dropped and counted in its next line.

    A terminal in Ctrl-S or a stopped pager would otherwise block the daemon, and with it every client.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = 0
        self._poll: select.poll | None = None
        with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
            descriptor = stream.fileno()
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    def write_line(self, line: str) -> None:
        text = line + "\n"
        if self._lost:
            text = f"({self._lost} lines were dropped: the reader was too slow; xditd logs has the last ones)\n{text}"
        # A closed pipe or a full disk must not end the daemon: the lines stay readable from memory.
        with contextlib.suppress(OSError):
            chars = _PIECE_BYTES if text.isascii() else _PIECE_BYTES // _ESCAPED_BYTES
            for start in range(0, len(text), chars):
                if self._poll is not None and not self._poll.poll(0):
                    self._lost += 1
                    return
                self._stream.write(text[start : start + chars])
                self._stream.flush()
            self._lost = 0


class LogBuffer:
    """Write lines to ``stream``, standard error by default, and keep the last ones of each :class:`Category`.

    Lines are numbered from 0, in the order in which they were added.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = LogStream(sys.stderr if stream is None else stream)
        self._lines = {category: deque[tuple[int, str]](maxlen=category.value) for category in Category}
        self.next_line = 0

    def add(self, line: str, category: Category = Category.REQUESTS) -> None:
        self._stream.write_line(line)
        for part in line[: limits.MAX_TEXT_CHARS].splitlines():
            self._lines[category].append((self.next_line, part[:MAX_LINE_CHARS]))
            self.next_line += 1

    def add_output(self, line: str) -> None:
        """Add a line of a worker's output, with the time: not every such line comes from a logger."""
        now_s = time.time()
        stamp = f"{time.strftime(_TIME, time.localtime(now_s))},{int(now_s * 1000) % 1000:03d}"
        self.add(f"{stamp} {line}", Category.WARNINGS if line.startswith(_WORKER_WARNINGS) else Category.WORKERS)

    def since(self, line: int) -> tuple[list[str], int]:
        """Return the lines from number ``line`` on, as many as one answer carries, and the number to ask for next."""
        found: list[str] = []
        room = MAX_ANSWER_CHARS
        for number, text in sorted(each for category in self._lines.values() for each in category if each[0] >= line):
            room -= len(text)
            if room < 0:
                return found, number
            found.append(text)
        return found, self.next_line


class OneLineFormatter(logging.Formatter):
    """Escape line breaks: a name that a client chose must not forge lines of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


class LogBufferHandler(logging.Handler):
    """Send log records to a :class:`LogBuffer`."""

    def __init__(self, log_buffer: LogBuffer) -> None:
        super().__init__()
        self._log_buffer = log_buffer
        self.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        info = Category.DAEMON if record.name in _DAEMON_LOGGERS else Category.REQUESTS
        self._log_buffer.add(self.format(record), Category.WARNINGS if is_warning else info)


def configure_logging(level: str) -> LogBuffer:
    """Send every record of this process to a new :class:`LogBuffer` on standard error."""
    log_buffer = LogBuffer()
    root = logging.getLogger()
    root.handlers[:] = [LogBufferHandler(log_buffer)]
    root.setLevel(level.upper())
    return log_buffer


def human_bytes(count: int) -> str:
    """Format a number of bytes for people: ``22.17 GiB``, ``7.3 MiB``, ``512 B``."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**10:.1f} KiB" if count >= 2**10 else f"{count} B"
