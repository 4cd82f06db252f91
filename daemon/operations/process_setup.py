"""What the daemon asks of the kernel for its own process: more open files, and the orphans of its children."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from typing import Final

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER: Final = 36


def raise_limit() -> None:
    """Raise the soft limit on descriptors to the hard one.

    libzmq 4.3.5 ends the whole process when ``accept(2)`` finds no free descriptor (``ipc_listener.cpp``, an assertion
    that forgets EMFILE), so a client with a thousand connections must not be able to use up the usual 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            logger.warning("limit on open files stays at soft=%d hard=%d: %s", soft, hard, error)


def adopt_orphans() -> None:
    """Become the parent of ranks whose leader has died, so that their end can be waited for.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER. Without it init reaps them, at a time that nobody tells us, and the next
    group could start while the memory of a dying rank is still in use.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        logger.warning("prctl failed error=%s; orphaned ranks are left to init", os.strerror(ctypes.get_errno()))
