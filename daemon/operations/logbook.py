"""The log: standard error, and the last lines in memory for ``xditd logs``."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from enum import Enum
from typing import Final, TextIO

from xditd.daemon.operations.log_stream import LogStream
from xditd.ipc import limits
from xditd.ipc.worker_messages import VERDICT_PREFIX

MAX_LINE_CHARS: Final = 2_000
MAX_ANSWER_CHARS: Final = 256 * 1024
"""In one ``LogLines``. A client that asks without reading can make us hold only so many of them."""


class Shelf(Enum):
    """Where a line is kept: none of them pushes out lines of another. The value is how many it holds."""

    LIFE = 200
    """The daemon's own: listening, workers starting, ready, given up, stopping."""
    WARNINGS = 400
    REQUESTS = 900
    """What clients ask, and all else at INFO and below."""
    WORKERS = 500
    """What the workers write, warnings and errors apart."""


assert sum(shelf.value for shelf in Shelf) == limits.MAX_LOG_LINES

_LIFE: Final = frozenset(
    {"xditd.daemon", "xditd.daemon.front.service", "xditd.daemon.groups.worker_group", "xditd.daemon.reload"}
)
"""Loggers that write a few lines in a day."""

_WORKER_WARNINGS: Final = ("WARNING ", "ERROR ", "CRITICAL ", VERDICT_PREFIX)
"""How lines of the leader and of ranks begin that are more than news."""

_TIME: Final = "%Y-%m-%d %H:%M:%S"


class Logbook:
    """Write lines to ``stream``, standard error by default, and keep the last of each :class:`Shelf`.

    They are numbered from 0 in the order in which they came.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = LogStream(sys.stderr if stream is None else stream)
        self._shelves = {shelf: deque[tuple[int, str]](maxlen=shelf.value) for shelf in Shelf}
        self.next_line = 0

    def add(self, line: str, shelf: Shelf = Shelf.REQUESTS) -> None:
        self._stream.write_line(line)
        for part in line[: limits.MAX_TEXT_CHARS].splitlines():
            self._shelves[shelf].append((self.next_line, part[:MAX_LINE_CHARS]))
            self.next_line += 1

    def add_output(self, line: str) -> None:
        """Add what a worker has written, with the time: not every line there comes from a logger."""
        now_s = time.time()
        stamp = f"{time.strftime(_TIME, time.localtime(now_s))},{int(now_s * 1000) % 1000:03d}"
        self.add(f"{stamp} {line}", Shelf.WARNINGS if line.startswith(_WORKER_WARNINGS) else Shelf.WORKERS)

    def since(self, line: int) -> tuple[list[str], int]:
        """Return the lines from number ``line`` on, as many as one answer carries, and the number to ask for next."""
        found: list[str] = []
        room = MAX_ANSWER_CHARS
        for number, text in sorted(each for shelf in self._shelves.values() for each in shelf if each[0] >= line):
            room -= len(text)
            if room < 0:
                return found, number
            found.append(text)
        return found, self.next_line


class OneLineFormatter(logging.Formatter):
    """Keep a message on one line: names that clients choose must not forge lines of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


class LogbookHandler(logging.Handler):
    """Send log records to a :class:`Logbook`."""

    def __init__(self, logbook: Logbook) -> None:
        super().__init__()
        self._logbook = logbook
        self.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        shelf = Shelf.WARNINGS if is_warning else Shelf.LIFE if record.name in _LIFE else Shelf.REQUESTS
        self._logbook.add(self.format(record), shelf)


def configure_logging(level: str) -> Logbook:
    """Send every record of this process to a new logbook on standard error."""
    logbook = Logbook()
    root = logging.getLogger()
    root.handlers[:] = [LogbookHandler(logbook)]
    root.setLevel(level.upper())
    return logbook


def human_bytes(count: int) -> str:
    """Spell a number of bytes for people: ``22.17 GiB``, ``7.3 MiB``, ``512 B``."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**10:.1f} KiB" if count >= 2**10 else f"{count} B"
