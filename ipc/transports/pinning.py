"""Pin pages of shared memory, so that the GPU copies to and from them asynchronously (DMA).

From pageable memory the driver copies in pieces through its own buffer, while the caller's thread waits. Pinning is
optional: without it, copies give the same result more slowly.

Source: CUDA Driver API, "cuMemHostRegister", "cuMemHostUnregister".
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 32 * 2**20
"""The largest block that is pinned. Pinned pages cannot be swapped out, and only small copies gain: they wait more for
the driver than for the bus."""

_PORTABLE: Final = 1
"""CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of this process, so for all its GPUs."""


def pin(owner: object, address: int, size_bytes: int, index: int) -> weakref.finalize[Any, Any] | None:
    """Pin mapped pages, for a process that uses GPU ``index`` already.

    Returns a finalizer that unpins them, or ``None`` if they cannot be pinned. Call it before they are unmapped: the
    driver would treat other pages at the same address as pinned. It is called with the end of ``owner``, which holds
    the mapping, at the latest.
    """
    if size_bytes > MAX_BYTES:
        return None
    try:
        with _context(index):
            # Not the runtime's function through torch: torch's next kernel launch would raise its error.
            (status,) = _driver().cuMemHostRegister(address, size_bytes, _PORTABLE)
    except (ImportError, RuntimeError) as error:  # no cuda-bindings, or a driver without the function
        logger.debug("not pinned size_bytes=%d reason=%s", size_bytes, error)
        return None
    if int(status) != 0:
        logger.debug("not pinned size_bytes=%d status=%s", size_bytes, status.name)
        return None
    unpin = weakref.finalize(owner, _unpin, address, index, os.getpid())
    unpin.atexit = False  # the end of the process unpins all, and torch may not work any more
    return unpin


def _unpin(address: int, index: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # CUDA does not work in a forked process, which has no pinned pages
    with _context(index):
        (status,) = _driver().cuMemHostUnregister(address)
    if int(status) != 0:
        logger.warning("pages stay pinned status=%s", status.name)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@contextmanager
def _context(index: int) -> Iterator[None]:
    """Make the GPU's existing context current in this thread, which may not have used the GPU before.

    torch alone does not do so before the runtime's next call if the thread's device is the right one already.
    """
    import torch
    from cuda.bindings import runtime

    with torch.cuda.device(index):
        runtime.cudaSetDevice(index)
        yield
