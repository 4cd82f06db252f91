"""Pages of shared memory pinned for the GPU, which then copies to and from them by itself.

From pageable memory the driver copies in pieces through a buffer of its own, while the caller's thread works. Pinning
is an offer: where it cannot be had, the same copies are made that way.

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

MOST_BYTES: Final = 32 * 2**20
"""Of one block: pinned pages cannot be swapped out, and only small copies wait for the driver more than for the bus."""

_PORTABLE: Final = 1
"""CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of this process, so for all its GPUs."""


def pin(owner: object, address: int, size_bytes: int, index: int) -> weakref.finalize[Any, Any] | None:
    """Pin mapped pages, for a process that uses GPU ``index`` already.

    Returns what unpins them, or ``None`` where they could not be pinned. It must be called before they are unmapped:
    the driver would take other pages, mapped at the same address later, for these. So it is called with the end of
    ``owner``, who holds the mapping, at the latest.
    """
    if size_bytes > MOST_BYTES:
        return None
    try:
        with _context(index):
            # Not the runtime's function through torch: its failure would be raised by torch's next kernel launch.
            (status,) = _driver().cuMemHostRegister(address, size_bytes, _PORTABLE)
    except (ImportError, RuntimeError) as error:  # no cuda-bindings, or a driver without the function
        logger.debug("not pinned size_bytes=%d reason=%s", size_bytes, error)
        return None
    if int(status) != 0:
        logger.debug("not pinned size_bytes=%d status=%s", size_bytes, status.name)
        return None
    unpin = weakref.finalize(owner, _unpin, address, index, os.getpid())
    unpin.atexit = False  # the process's end unpins all, and torch may be gone by then
    return unpin


def _unpin(address: int, index: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # CUDA does not work in a fork, which has none of these pages pinned
    with _context(index):
        (status,) = _driver().cuMemHostUnregister(address)
    if int(status) != 0:
        logger.warning("pages stay pinned status=%s", status.name)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@contextmanager
def _context(index: int) -> Iterator[None]:
    """Make the GPU's context, which exists, the current one of this thread, which may never have used the GPU.

    torch alone leaves that to the runtime's next call where the thread's device is the right one already.
    """
    import torch
    from cuda.bindings import runtime

    with torch.cuda.device(index):
        runtime.cudaSetDevice(index)
        yield
