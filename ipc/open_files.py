"""Detect and describe that a process has too many open files (EMFILE)."""

from __future__ import annotations

import errno
import os
import resource


def is_want_of_descriptors(error: BaseException) -> bool:
    """Return whether an error means that this process, or the machine, can open no more files.

    C++ libraries lose the errno: gloo raises RuntimeError with the system's message (gloo/transport/tcp/loop.cc).
    """
    number = getattr(error, "errno", None)
    return number in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(error)


def describe_limit() -> str:
    """Name the limit on open files of this process, and the remedy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"too many open files: the hard limit of this process is {hard}; raise it to 1024 or more "
        "(ulimit -Hn, LimitNOFILE= of the service, --ulimit nofile= of the container), then start the daemon again"
    )
