"""Share host memory through sealed memfds: tensors that are not in a file, and the inputs and outputs of jobs.

A memfd has no name, so nothing stays in /dev/shm when its owner is killed; its pages exist until the last process
unmaps them. Seals fix its size, so a truncation cannot cause SIGBUS in readers.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.errors import Internal, OutOfMemory, StaleSource
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import Fingerprint, HostShmBlock
from xditd.ipc.transports.descriptors import open_descriptor, refusal
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES, digest_bytes
from xditd.ipc.transports.pinning import pin
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, align, torch_dtype

if TYPE_CHECKING:
    import torch

# linux/fcntl.h; the fcntl module has these names only from Python 3.11 on.
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
F_SEAL_SEAL: Final = 0x0001
F_SEAL_SHRINK: Final = 0x0002
F_SEAL_GROW: Final = 0x0004
_SEALS: Final = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


class HostArena:
    """A sealed memfd, mapped for reading and writing in the process that made it.

    The arena owns the memory: keep it until every loan of it has been returned. Drop all views from :meth:`tensor` and
    :meth:`view` before :meth:`close`.
    """

    def __init__(self, size_bytes: int, name: str = "xditd") -> None:
        self.size_bytes = align(max(size_bytes, 1), ALLOCATION_BYTES)
        try:
            self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise OutOfMemory(f"shared memory of {self.size_bytes} bytes: {error.strerror}") from error
        # If the arena is not closed, the descriptor is closed with the object, and the mapping with the last view.
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        try:
            os.ftruncate(self._fd, self.size_bytes)
            fcntl.fcntl(self._fd, F_ADD_SEALS, _SEALS)
            self._inode = os.fstat(self._fd).st_ino
            self._mapping = mmap.mmap(self._fd, self.size_bytes)
        except (OSError, OverflowError) as error:
            self._close_fd()
            raise OutOfMemory(f"shared memory of {self.size_bytes} bytes: {error}") from error
        self._unpin: weakref.finalize[Any, Any] | None = None
        self._is_pin_tried = False

    def pin(self, index: int) -> None:
        """Pin the arena, if possible, for copies to and from the GPUs of this process, which uses GPU ``index``."""
        if not self._is_pin_tried:
            self._is_pin_tried = True
            self._unpin = pin(self, self.tensor(0, "uint8", (1,)).data_ptr(), self.size_bytes, index)

    def block(self, sample_offset_bytes: int = 0) -> HostShmBlock:
        """Describe the arena to other processes, with a fingerprint of its present content."""
        end = min(sample_offset_bytes + SAMPLE_BYTES, self.size_bytes)
        sample = self._mapping[sample_offset_bytes:end]
        return HostShmBlock(
            fd=self._fd,
            inode=self._inode,
            size_bytes=self.size_bytes,
            fingerprint=Fingerprint(
                offset_bytes=sample_offset_bytes, length_bytes=len(sample), digest=digest_bytes(sample)
            ),
        )

    def tensor(self, offset_bytes: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a writable CPU tensor that views part of the arena."""
        import torch

        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=torch_dtype(dtype))
        # torch does not lock the buffer of an mmap, which could then be closed under a tensor. A memoryview locks it
        # for as long as torch references the memoryview.
        flat = torch.frombuffer(memoryview(self._mapping), dtype=torch_dtype(dtype), count=count, offset=offset_bytes)
        return flat.view(shape)

    def view(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """Return a writable memoryview of part of the arena."""
        return memoryview(self._mapping)[offset_bytes : offset_bytes + size_bytes]

    def close(self) -> None:
        """Unmap and close.

        Raises:
            Internal: a view is still alive; the memory stays.
        """
        if self._mapping.closed:
            return
        if self._unpin is not None:
            self._unpin()
        try:
            self._mapping.close()
        except BufferError as error:
            raise Internal(
                f"shared memory of {self.size_bytes} bytes: a tensor that views it is still alive"
            ) from error
        self._close_fd()


class HostMapping:
    """A memfd or file of another process, mapped into this one."""

    def __init__(self, fd: int, size_bytes: int, *, is_writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        self.size_bytes = size_bytes
        found = os.fstat(fd)
        self.identity = found.st_dev, found.st_ino
        """Device and inode, which no other file can have while this one is mapped."""
        self._mapping = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=protection)
        self._unpin: weakref.finalize[Any, Any] | None = None

    def pin(self, index: int) -> None:
        """Pin the mapping for copies to and from GPU ``index``, if possible. Call it once."""
        self._unpin = pin(self, self.bytes_tensor().data_ptr(), self.size_bytes, index)

    def bytes_tensor(self) -> torch.Tensor:
        """View the whole mapping as 1-D uint8. Writing to a read-only mapping would be a segmentation fault."""
        import torch

        mapped = memoryview(self._mapping)  # see HostArena.tensor
        if not mapped.readonly:
            return torch.frombuffer(mapped, dtype=torch.uint8)
        with warnings.catch_warnings():
            # torch warns that tensors cannot be read-only; weights are never written to here.
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            return torch.frombuffer(mapped, dtype=torch.uint8)

    def close(self) -> None:
        """Unmap.

        Raises:
            Internal: a view is still alive; the mapping stays.
        """
        if self._unpin is not None:
            self._unpin()
        try:
            self._mapping.close()
        except BufferError as error:
            raise Internal(f"mapping of {self.size_bytes} bytes: a tensor that views it is still alive") from error


def map_shm(block: HostShmBlock, exporter: ProcessIdentity, *, is_writable: bool = False) -> HostMapping:
    """Map another process's sealed memfd; the caller checks the fingerprint.

    Raises:
        ProcessGone, StaleSource, NotPermitted, OutOfMemory: as :func:`open_descriptor`, or the descriptor is not the
            sealed memfd that was described.
    """
    what = f"shared memory of process {exporter.pid} (descriptor {block.fd})"
    fd = open_descriptor(exporter, block.fd, is_writable=is_writable, what=what)
    try:
        found = os.fstat(fd)
        try:
            seals = fcntl.fcntl(fd, F_GET_SEALS)
        except OSError as error:
            raise StaleSource(f"{what}: not a memfd") from error
        if found.st_ino != block.inode or found.st_size != block.size_bytes:
            raise StaleSource(
                f"{what}: inode {found.st_ino} with {found.st_size} bytes, but inode {block.inode} with "
                f"{block.size_bytes} was lent; lend it again"
            )
        if not seals & F_SEAL_SHRINK:
            raise StaleSource(f"{what}: not sealed against shrinking; only sealed memfds are mapped")
        return HostMapping(fd, block.size_bytes, is_writable=is_writable)
    except (OSError, ValueError) as error:
        raise refusal(what, error) from error
    finally:
        os.close(fd)
