"""Explain why a worker cannot start: the reason and the remedy, and whether a restart can help."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

from xditd.ipc import host_limits
from xditd.ipc.errors import RequestError, XditdError
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors

MAX_DETAIL_BYTES = 65_536

_MEMORY_WORDS: Final = (os.strerror(errno.ENOMEM), "failed to map segment from shared object")
_NO_THREAD: Final = ("can't start new thread", os.strerror(errno.EAGAIN))
"""Python's words, and those of std::thread in native code, which are the whole message."""


def explain(error: Exception) -> tuple[str, bool]:
    """Return the reason, and whether it is final: a restart does not help against a setting or a limit."""
    if isinstance(error, RequestError):
        return error.detail, True
    if is_want_of_descriptors(error):
        return describe_limit(), True
    if _is_want_of_memory(error):
        return host_limits.without_memory(_describe(error)), False
    if (isinstance(error, OSError) and error.errno == errno.EAGAIN) or str(error).strip() in _NO_THREAD:
        return host_limits.without_threads(_describe(error)), False
    if isinstance(error, ImportError):
        return (
            f"{sys.executable} cannot import what workers need: {error}; install it there (pip install "
            "'xditd[workers]'), or name another interpreter ([workers] command)",
            True,
        )
    if isinstance(error, XditdError):
        return error.detail, False
    limits = host_limits.describe_memory() if isinstance(error, SystemError) else ""
    # Without memory Python's import fails in many ways, also with an error that says nothing.
    return f"{_describe(error)}; perhaps for want of memory: allowed are {limits}" if limits else _describe(
        error
    ), False


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
