"""The limit on open files, raised to what this process may have."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)


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
