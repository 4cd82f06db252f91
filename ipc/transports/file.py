"""Lend files by open descriptor: workers map the same file as the client, and share its page cache."""

from __future__ import annotations

import errno
import logging
import os
import stat

from xditd.ipc.addresses import MISSING
from xditd.ipc.errors import BadCheckpoint, OutOfMemory, StaleSource
from xditd.ipc.file_kinds import folder_kind
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import FileBlock, Fingerprint
from xditd.ipc.transports.descriptors import NO_ROOM, open_descriptor, refusal
from xditd.ipc.transports.file_state import SMALL_BYTES, DigestThread, FileState, digest_file, settled_stat
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES, digest_bytes
from xditd.ipc.transports.host_shm import HostMapping
from xditd.ipc.transports.upload_pieces import FileStretch

logger = logging.getLogger(__name__)


class LentFile:
    """A regular file, held open for as long as it is lent."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
        except OSError as error:
            if error.errno in NO_ROOM:
                raise OutOfMemory(f"{path}: {error.strerror} in this process") from error
            raise BadCheckpoint(f"{path}: {MISSING if error.errno == errno.ENOENT else error.strerror}") from error
        except ValueError as error:
            raise BadCheckpoint(f"{path!r}: {error}") from error
        opened = settled_stat(self.fd)
        if not stat.S_ISREG(opened.st_mode):
            os.close(self.fd)
            what = f"this is {folder_kind(path)}" if stat.S_ISDIR(opened.st_mode) else "not a regular file"
            raise BadCheckpoint(f"{path}: {what}")
        self._opened = FileState.of_stat(opened)

    @property
    def state(self) -> FileState:
        """Its state when it was opened."""
        return self._opened

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        return self._opened.device, self._opened.inode

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            StaleSource: it was rewritten, extended, truncated or renamed.
        """
        found = FileState.of_stat(os.fstat(self.fd))
        if found != self._opened:
            raise StaleSource(
                f"{self.path}: changed while it was being read ({self._opened.differences(found)}); "
                "lend it again once it is complete"
            )

    def read(self, size_bytes: int, offset_bytes: int) -> bytes:
        """Read part of the file; less if it ends before.

        Raises:
            BadCheckpoint: it cannot be read.
        """
        try:
            return os.pread(self.fd, size_bytes, offset_bytes)
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: OSError) -> BadCheckpoint:
        """Return the error of a file of which some bytes cannot be read."""
        return BadCheckpoint(
            f"{self.path}: it cannot be read: {error.strerror or error}; look after its disk or network (dmesg), "
            "or get the file again"
        )

    def block(self, header_bytes: int = SAMPLE_BYTES) -> FileBlock:
        """Describe the file, with a fingerprint of ``header_bytes`` from its start.

        Raises:
            StaleSource: it has changed since it was opened.
            BadCheckpoint: it cannot be read.
        """
        found = self._opened
        sample = self.read(header_bytes, 0)
        self.check_unchanged()
        return FileBlock(
            fd=self.fd,
            path=os.fsencode(self.path).decode("utf-8", "replace"),  # for people; names need not be Unicode
            device=found.device,
            inode=found.inode,
            mtime_ns=found.mtime_ns,
            ctime_ns=found.ctime_ns,
            size_bytes=found.size_bytes,
            fingerprint=Fingerprint(length_bytes=len(sample), digest=digest_bytes(sample)),
        )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FileMapping(HostMapping):
    """A lent file, mapped read-only.

    ``state`` is one in which the file had the bytes that were lent; ``digest`` is their digest, if it is known.
    """

    def __init__(self, fd: int, block: FileBlock, state: FileState, digest: bytes | None) -> None:
        self._fd = fd
        self._path = block.path
        self._state = state
        self._digest = digest
        self._thread: DigestThread | None = None
        super().__init__(fd, block.size_bytes, is_writable=False)

    def begin_digest(self) -> None:
        """Digest the file in a thread, so that later a change of only its ctime can be distinguished from a write."""
        if self._digest is None and self._thread is None:
            try:
                self._thread = DigestThread(self._fd, self._state, self._path)
            except (OSError, RuntimeError) as error:  # no descriptor or thread is available; the digest is optional
                logger.warning("file not digested path=%s: %s", self._path, error)

    def await_small_digest(self) -> None:
        """Wait for the digest of a small file. Larger ones are digested in the background."""
        if self._thread is not None and self._state.size_bytes <= SMALL_BYTES:
            self._thread.wait()

    @property
    def is_digesting(self) -> bool:
        """Whether :attr:`digest` may be known later."""
        return self._thread is not None and not self._thread.is_over

    @property
    def digest(self) -> bytes | None:
        """The digest of the bytes that were lent; ``None`` until it is known."""
        if self._digest is None and self._thread is not None:
            self._digest = self._thread.found
        return self._digest

    def check_unchanged(self) -> None:
        """Check that the file is the one that was lent. Call before and after reading.

        If only its ctime has changed, as after chmod, a rename or a new hard link, its bytes are read once and compared
        by their digest, if that is known.

        Raises:
            StaleSource: it was rewritten or truncated, or is another file; or its ctime changed before it was digested.
        """
        self._state = _check_state(self._fd, self._path, self._state, self.digest)

    def stretch(self, offset_bytes: int, size_bytes: int) -> FileStretch:
        """Describe part of the file for an upload, which reads it; valid until :meth:`close`."""
        return FileStretch(self._fd, offset_bytes, size_bytes, self._path)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.stop()
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _check_state(fd: int, path: str, known: FileState, digest: bytes | None) -> FileState:
    """Check that a file has the same bytes as in a known state; return its present state.

    Raises:
        StaleSource: more than its ctime has changed, or the bytes do not have this ``digest``.
    """
    found = FileState.of_stat(os.fstat(fd))
    if found == known:
        return known
    if found._replace(ctime_ns=known.ctime_ns) != known:
        raise _changed(path, known.differences(found))
    if digest is None:
        raise _changed(path, "ctime, before its bytes were digested, so it is not known whether they changed")
    found = FileState.of_stat(settled_stat(fd))
    # The state is the same before and after reading, so no write happened in between.
    if digest_file(fd, found.size_bytes) != digest or FileState.of_stat(os.fstat(fd)) != found:
        raise _changed(path, "ctime and bytes")
    logger.info("file accepted path=%s: its ctime has changed, its bytes have not", path)
    return found


def _changed(path: str, what: str) -> StaleSource:
    return StaleSource(f"{path}: changed since it was lent ({what}); lend it again")


def map_file(block: FileBlock, exporter: ProcessIdentity, digest: bytes | None = None) -> FileMapping:
    """Map another process's open file read-only; the caller checks the fingerprint.

    ``digest`` is that of the bytes that were lent, if an earlier mapping has computed it.

    Raises:
        ProcessGone, StaleSource, NotPermitted, OutOfMemory: as :func:`open_descriptor`, or the file has changed.
    """
    fd = open_descriptor(exporter, block.fd, is_writable=False, what=block.path)
    try:
        state = _check_state(fd, block.path, FileState.of_block(block), digest)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StaleSource(f"{block.path}: not a regular file")
        return FileMapping(fd, block, state, digest)
    except StaleSource:
        os.close(fd)
        raise
    except (OSError, ValueError) as error:
        os.close(fd)
        raise refusal(block.path, error) from error
