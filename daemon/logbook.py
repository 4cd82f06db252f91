"""The log: standard error, and the last lines in memory for ``xditd logs``."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import deque
from typing import Final, TextIO

from xditd.daemon.log_stream import LogStream
from xditd.ipc import limits

MAX_LINE_CHARS: Final = 2_000
MAX_ANSWER_CHARS: Final = 256 * 1024
"""In one ``LogLines``. A client that asks without reading can make us hold only so many of them."""


class Logbook:
    """Write lines to ``stream``, standard error by default, and keep the last of them, numbered from 0.

    It keeps :data:`xditd.ipc.limits.MAX_LOG_LINES`.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = LogStream(sys.stderr if stream is None else stream)
        self._lines: deque[str] = deque(maxlen=limits.MAX_LOG_LINES)
        self.next_line = 0

    def add(self, line: str) -> None:
        self._stream.write_line(line)
        for part in line[: limits.MAX_TEXT_CHARS].splitlines():
            self._lines.append(part[:MAX_LINE_CHARS])
            self.next_line += 1

    def since(self, line: int) -> tuple[list[str], int]:
        """Return the lines from number ``line`` on, as many as one answer carries, and the number to ask for next."""
        first_kept = self.next_line - len(self._lines)
        start = min(max(line, first_kept), self.next_line)
        found: list[str] = []
        room = MAX_ANSWER_CHARS
        for text in itertools.islice(self._lines, start - first_kept, None):
            room -= len(text)
            if room < 0:
                break
            found.append(text)
        return found, start + len(found)


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
        self._logbook.add(self.format(record))


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
