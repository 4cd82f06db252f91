"""Detect changes of a file by inode, size and times, and by a digest of its bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from hashlib import blake2b
from typing import Final, NamedTuple

from xditd.ipc.tensors import FileBlock

logger = logging.getLogger(__name__)

SMALL_BYTES: Final = 64 * 2**20
"""A file up to this size is digested faster than anybody can rename it after the lend."""

_PIECE_BYTES: Final = 2 * 2**20
# linux/time.h; the time module has no name for it. Source: clock_getres(2).
_CLOCK_REALTIME_COARSE: Final = 5
_TICK_NS: Final = 10_000_000
"""The longest tick of the clock that stamps files (CONFIG_HZ=100)."""


class FileState(NamedTuple):
    """The state of a file, which changes with its content.

    A writer cannot set ``ctime_ns``; sync and restore tools do set ``mtime_ns``. ``ctime_ns`` also changes without a
    write, with mode, owner, name or number of links.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of_block(cls, block: FileBlock) -> FileState:
        return cls(block.device, block.inode, block.size_bytes, block.mtime_ns, block.ctime_ns)

    @classmethod
    def of_stat(cls, found: os.stat_result) -> FileState:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def differences(self, other: FileState) -> str:
        """Return the names of the fields that differ, for messages."""
        fields = ("device", "inode", "size", "mtime", "ctime")
        return ", ".join(name for name, old, new in zip(fields, self, other, strict=True) if old != new)


def settled_stat(fd: int) -> os.stat_result:
    """Return the stat of an open file at a time after which every change must alter its ctime.

    The kernel stamps changes with a clock that ticks every 1 to 10 ms: two changes within a tick have the same stamp.
    So the stat of a file that has just changed is read again after the next tick.

    Source: Linux, kernel/time/timekeeping.c, "ktime_get_coarse_real_ts64"; fs/inode.c, "current_time".
    """
    waited_until = time.monotonic_ns() + _TICK_NS
    while True:
        found = os.fstat(fd)
        age_ns = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) - found.st_ctime_ns
        # A file server's clock may be far ahead of this machine's; a wait would not end then.
        if age_ns > 0 or age_ns < -_TICK_NS or time.monotonic_ns() > waited_until:
            return found
        time.sleep(1e-3)


def digest_file(fd: int, size_bytes: int, stop: threading.Event | None = None) -> bytes | None:
    """Return the BLAKE2b-128 of an open file; ``None`` if it is truncated, cannot be read, or ``stop`` is set.

    The file is read, not mapped: reading a mapping of a truncated file would end the process (SIGBUS). The GIL is
    released while reading and hashing.
    """
    digest = blake2b(digest_size=16)
    room = memoryview(bytearray(min(_PIECE_BYTES, max(size_bytes, 1))))
    at = 0
    while at < size_bytes:
        if stop is not None and stop.is_set():
            return None
        try:
            count = os.preadv(fd, (room[: size_bytes - at],), at)
        except OSError:
            return None
        if not count:
            return None
        digest.update(room[:count])
        at += count
    return digest.digest()


class DigestThread:
    """A background thread that digests an open file of a known state once.

    It reads through its own descriptor and closes it, so that nobody has to wait for the thread.

    Raises:
        OSError, RuntimeError: no descriptor or no thread is available.
    """

    def __init__(self, fd: int, state: FileState, path: str) -> None:
        self._fd = os.dup(fd)
        self._state = state
        self._path = path
        self._found: bytes | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xditd-digest", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            os.close(self._fd)
            raise

    @property
    def found(self) -> bytes | None:
        """The digest of the bytes that the file had in the given state; ``None`` until it is known."""
        return self._found

    @property
    def is_over(self) -> bool:
        """Whether the thread has ended, so that :attr:`found` is final."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the digest."""
        self._thread.join()

    def stop(self) -> None:
        """Stop at the next piece. Does not wait: on a busy machine, the idle-priority thread took up to 13 s to end."""
        self._stop.set()

    def _run(self) -> None:
        try:
            self._digest()
        finally:
            os.close(self._fd)

    def _digest(self) -> None:
        started = time.perf_counter()
        if self._state.size_bytes > SMALL_BYTES:
            # Jobs have priority: the thread uses only idle cores.
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        found = digest_file(self._fd, self._state.size_bytes, self._stop)
        # A write since the state was read would have changed the ctime.
        if found is not None and FileState.of_stat(os.fstat(self._fd)) == self._state:
            self._found = found
            logger.debug("file digested path=%s digest_s=%.2f", self._path, time.perf_counter() - started)
