"""Set up the daemon's process: raise the limit on open files, and become the parent of orphaned ranks."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from typing import Final

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER: Final = 36


def raise_limit() -> None:
    """Raise the soft limit on open files (RLIMIT_NOFILE) to the hard one.

    libzmq 4.3.5 aborts the process when ``accept(2)`` finds no free descriptor (``ipc_listener.cpp``, an assertion that
    does not expect EMFILE), so a client with a thousand connections must not use up the usual 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            logger.warning("limit on open files stays at soft=%d hard=%d: %s", soft, hard, error)


def adopt_orphans() -> None:
    """Become the parent of ranks whose leader has ended, so that the daemon can wait for their end.

    Without it init reaps them at an unknown time, and the next group could start while a rank's memory is in use.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        logger.warning("prctl failed error=%s; orphaned ranks are left to init", os.strerror(ctypes.get_errno()))
