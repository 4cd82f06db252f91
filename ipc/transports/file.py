"""Files lent by open descriptor: workers map the very file that the client holds, page cache and all."""

from __future__ import annotations

import os
import stat

from xditd.ipc.errors import BadCheckpoint, OutOfMemory, StaleSource
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import FileBlock, Fingerprint
from xditd.ipc.transports.descriptors import NO_ROOM, open_descriptor, refusal
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES, digest_bytes
from xditd.ipc.transports.host_shm import HostMapping
from xditd.ipc.transports.uploads import FileStretch


class LentFile:
    """A regular file, held open for as long as it is lent."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
        except OSError as error:
            if error.errno in NO_ROOM:
                raise OutOfMemory(f"{path}: {error.strerror} in this process") from error
            raise BadCheckpoint(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise BadCheckpoint(f"{path!r}: {error}") from error
        self._opened = os.fstat(self.fd)
        if not stat.S_ISREG(self._opened.st_mode):
            os.close(self.fd)
            raise BadCheckpoint(f"{path}: not a regular file")

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        return self._opened.st_dev, self._opened.st_ino

    def check_unchanged(self) -> None:
        """Check that what was read since the file was opened is what it still holds.

        Raises:
            StaleSource: it was rewritten, grown or truncated meanwhile.
        """
        found = os.fstat(self.fd)
        if (found.st_size, found.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise StaleSource(f"{self.path}: changed while it was being read; lend it again once it is complete")

    def block(self, header_bytes: int = SAMPLE_BYTES) -> FileBlock:
        """Describe the file; ``header_bytes`` from its start are fingerprinted.

        Raises:
            StaleSource: it is not what was opened any more.
        """
        found = self._opened
        sample = os.pread(self.fd, header_bytes, 0)
        self.check_unchanged()
        return FileBlock(
            fd=self.fd,
            path=os.fsencode(self.path).decode("utf-8", "replace"),  # for people; names need not be Unicode
            device=found.st_dev,
            inode=found.st_ino,
            mtime_ns=found.st_mtime_ns,
            size_bytes=found.st_size,
            fingerprint=Fingerprint(length_bytes=len(sample), digest=digest_bytes(sample)),
        )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FileMapping(HostMapping):
    """A lent file, mapped read-only; :meth:`check_unchanged` tells whether it is still what was lent."""

    def __init__(self, fd: int, block: FileBlock) -> None:
        self._fd = fd
        self._block = block
        super().__init__(fd, block.size_bytes, is_writable=False)

    def check_unchanged(self) -> None:
        """Compare the file's identity with the one that was lent. Call before and after reading.

        Raises:
            StaleSource: it was rewritten, truncated, or is another file.
        """
        check_identity(self._fd, self._block)

    def stretch(self, offset_bytes: int, size_bytes: int) -> FileStretch:
        """Name part of the file for an upload, which reads it; valid until :meth:`close`."""
        return FileStretch(self._fd, offset_bytes, size_bytes, self._block.path)

    def close(self) -> None:
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check_identity(fd: int, block: FileBlock) -> None:
    """Check that an open descriptor is the file that was lent, unchanged.

    Raises:
        StaleSource: anything differs.
    """
    found = os.fstat(fd)
    actual = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if actual != (block.device, block.inode, block.size_bytes, block.mtime_ns):
        raise StaleSource(f"{block.path}: changed since it was lent (device, inode, size or mtime); lend it again")
    if not stat.S_ISREG(found.st_mode):
        raise StaleSource(f"{block.path}: not a regular file")


def map_file(block: FileBlock, exporter: ProcessIdentity) -> FileMapping:
    """Map another process's open file read-only; the fingerprint is the caller's to check.

    Raises:
        ProcessGone, StaleSource, NotPermitted, OutOfMemory: as :func:`open_descriptor`, or the file has changed.
    """
    fd = open_descriptor(exporter, block.fd, is_writable=False, what=block.path)
    try:
        check_identity(fd, block)
        return FileMapping(fd, block)
    except StaleSource:
        os.close(fd)
        raise
    except (OSError, ValueError) as error:
        os.close(fd)
        raise refusal(block.path, error) from error
