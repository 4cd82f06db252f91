"""Explain why a worker cannot start: the reason and the remedy, and whether a restart can help."""

from __future__ import annotations

import sys

from xditd.ipc.errors import RequestError, XditdError
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors

MAX_DETAIL_BYTES = 65_536


def explain(error: Exception) -> tuple[str, bool]:
    """Return the reason, and whether it is final: a restart does not help against a setting or a limit."""
    if isinstance(error, RequestError):
        return error.detail, True
    if is_want_of_descriptors(error):
        return describe_limit(), True
    if isinstance(error, ImportError):
        return (
            f"{sys.executable} cannot import what workers need: {error}; install it there (pip install "
            "'xditd[workers]'), or name another interpreter ([workers] command)",
            True,
        )
    if isinstance(error, XditdError):
        return error.detail, False
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line}", False
