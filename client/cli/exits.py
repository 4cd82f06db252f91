"""Exit codes, and which error ends with which."""

from __future__ import annotations

import logging
import sys

from xditd.ipc.errors import BadRequest, DaemonUnreachable, XditdError

DONE = 0
FAILED = 1
MISUSE = 2
UNREACHABLE = 3
INTERRUPTED = 130
"""As a shell reports a program that Ctrl-C ended (128 + SIGINT)."""

READER_LEFT = 141
"""As a shell reports a program that wrote to a pipe whose reader had gone (128 + SIGPIPE)."""

HELP = (
    "exit status: 0 done, 1 failed, 2 misuse, 3 daemon not reachable, 130 interrupted,\n141 the reader of stdout left"
)


def code_for(error: XditdError) -> int:
    """Choose the exit code for an error that ended a verb."""
    if isinstance(error, DaemonUnreachable):
        return UNREACHABLE
    return MISUSE if isinstance(error, BadRequest) else FAILED


def configure_logging(level: str) -> None:
    """Log to stderr: stdout is for data."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
