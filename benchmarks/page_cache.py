"""Whether a file lies in the page cache, and getting it out of there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
MOST_LEFT = 0.02


def evict(path: Path) -> str | None:
    """Have the next reader of a file find none of it in memory; returns why not, where that cannot be had.

    Source: posix_fadvise(2), "POSIX_FADV_DONTNEED": dirty pages stay, so they are written first.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident_share(path)
    if left > MOST_LEFT:
        return f"cold file: {left:.0%} stay in memory after posix_fadvise(DONTNEED); is this file system memory itself?"
    return None


def resident_share(path: Path) -> float:
    """The share of a file's pages that are in memory. Source: mincore(2)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    # Private and writable, though nothing is written: ctypes takes the address of writable memory only.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found)
        del first  # it keeps the mapping open
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(each & 1 for each in bytes(found)) / pages
