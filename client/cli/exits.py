"""Exit codes of ``xditd``, and the exit code for each error."""

from __future__ import annotations

import logging
import sys

from xditd.ipc.errors import BadRequest, DaemonUnreachable, XditdError
from xditd.ipc.interrupted_imports import INTERRUPTED as INTERRUPTED

DONE = 0
FAILED = 1
MISUSE = 2
UNREACHABLE = 3
READER_LEFT = 141
"""128 + SIGPIPE, as a shell reports a program that wrote to a pipe without a reader."""

HELP = "exit status: 0 done, 1 failed, 2 misuse, 3 daemon not reachable, 130 interrupted,\n141 stdout pipe closed"


def code_for(error: XditdError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, DaemonUnreachable):
        return UNREACHABLE
    return MISUSE if isinstance(error, BadRequest) else FAILED


def configure_logging(level: str | None, is_verbose: bool = False) -> None:
    """Log to stderr, because stdout is for data: records of this level and above, if verbose also those of INFO.

    Without a level, records of WARNING and above, ours and those of other libraries.
    """
    lowest: int = logging.WARNING if level is None else logging.getLevelName(level.upper())
    logging.basicConfig(
        level=min(lowest, logging.INFO) if is_verbose else lowest,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
