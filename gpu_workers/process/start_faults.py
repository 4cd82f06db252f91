"""Explain why a worker cannot start: the reason and the remedy, and whether a restart can help."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

from xditd.ipc.errors import RequestError, XditdError
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors

MAX_DETAIL_BYTES = 65_536

_MEMORY_WORDS: Final = (os.strerror(errno.ENOMEM), "failed to map segment from shared object")
_MEMORY_REMEDY: Final = (
    "free some, or raise the limit (ulimit -v, MemoryMax= of the service, --memory of the container)"
)
_PROCESS_REMEDY: Final = "raise the limit (ulimit -u, TasksMax= of the service, --pids-limit of the container)"


def explain(error: Exception) -> tuple[str, bool]:
    """Return the reason, and whether it is final: a restart does not help against a setting or a limit."""
    if isinstance(error, RequestError):
        return error.detail, True
    if is_want_of_descriptors(error):
        return describe_limit(), True
    if _is_want_of_memory(error):
        return f"out of host memory: {_describe(error)}; {_MEMORY_REMEDY}", False
    if (isinstance(error, OSError) and error.errno == errno.EAGAIN) or "can't start new thread" in str(error):
        return f"no process or thread can be started: {_describe(error)}; {_PROCESS_REMEDY}", False
    if isinstance(error, ImportError):
        return (
            f"{sys.executable} cannot import what workers need: {error}; install it there (pip install "
            "'xditd[workers]'), or name another interpreter ([workers] command)",
            True,
        )
    if isinstance(error, XditdError):
        return error.detail, False
    return _describe(error), False


def _describe(error: Exception) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def _is_want_of_memory(error: Exception) -> bool:
    """The dynamic linker says so in words alone, in an ImportError."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, (ImportError, OSError)) and any(words in str(error) for words in _MEMORY_WORDS))
    )
