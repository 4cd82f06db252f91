"""Shared memory blocks that hold a job's input and output tensors, and a pool of them.

Each job takes its own block from the pool, so that jobs of several threads do not share one. Inputs come first,
outputs after them; both are copied, so that a block can be used for the next job at once.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from xditd.ipc.tensors import DType, HostShmBlock, IoTensor
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, align, dtype_name

if TYPE_CHECKING:
    import torch

    from xditd.ipc.transports.host_shm import HostArena

_FINGERPRINTED_BYTES: Final = 4096
_IDLE_BLOCKS_OF_A_SIZE: Final = 4


class IoPlaces:
    """Offsets of a job's tensors in its block: inputs first, outputs after them, each at a multiple of 256 bytes."""

    def __init__(self) -> None:
        self._end = 0
        self._has_outputs = False

    @property
    def size_bytes(self) -> int:
        return max(self._end, _FINGERPRINTED_BYTES)

    def add_input(self, tensor: torch.Tensor) -> IoTensor:
        """Reserve room for an input of this dtype and shape. All inputs come before the first output."""
        if self._has_outputs:
            raise ValueError("inputs come before outputs")
        return self._reserve(dtype_name(tensor.dtype), tuple(tensor.shape))

    def add_output(self, dtype: torch.dtype, shape: tuple[int, ...]) -> IoTensor:
        """Reserve room for an output."""
        self._begin_outputs()
        return self._reserve(dtype_name(dtype), shape)

    def add_room(self, size_bytes: int) -> int:
        """Reserve room for outputs whose offsets the workers choose; returns the offset of the room."""
        self._begin_outputs()
        offset = align(self._end)
        self._end = offset + size_bytes
        return offset

    def _begin_outputs(self) -> None:
        if not self._has_outputs:
            # A worker verifies the first bytes of a block when it maps it. A faster rank that already writes its
            # outputs must not change them.
            self._end = max(self._end, _FINGERPRINTED_BYTES)
            self._has_outputs = True

    def _reserve(self, dtype: DType, shape: tuple[int, ...]) -> IoTensor:
        offset = align(self._end)
        spec = IoTensor(offset_bytes=offset, dtype=dtype, shape=shape)
        self._end = offset + spec.size_bytes
        return spec


class IoBlock:
    """The block of one job."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena

    def write(self, spec: IoTensor, tensor: torch.Tensor) -> None:
        """Copy a tensor, also from a GPU, into the block; the copy is complete on return."""
        place = self.arena.tensor(spec.offset_bytes, spec.dtype, spec.shape)
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg():
            _copy_bytes(place, tensor)
        else:
            if tensor.device.type == "cuda":
                self.arena.pin(tensor.device.index)
            place.copy_(tensor.detach())

    def read(self, spec: IoTensor, device: torch.device) -> torch.Tensor:
        """Copy a tensor out of the block, to memory that the caller owns."""
        import torch

        view = self.arena.tensor(spec.offset_bytes, spec.dtype, spec.shape)
        if device.type != "cpu":
            return view.to(device, copy=True)
        copy = torch.empty_like(view)
        _copy_bytes(copy, view)
        return copy

    def describe(self) -> HostShmBlock:
        """Describe the block for a message. Call it after the inputs are written: it computes the fingerprint."""
        return self.arena.block()


def _copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy contiguous host memory in this thread, not by torch.

    torch splits even a small copy over all its threads, and waking sixteen of them took 10 ms in a worker.
    """
    import ctypes

    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


class IoPool:
    """Idle blocks by size, powers of two. Safe to use from several threads."""

    def __init__(self) -> None:
        self._idle: dict[int, list[HostArena]] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def borrow(self, size_bytes: int) -> IoBlock:
        """Take a block of at least ``size_bytes``. Give it back when no worker uses it any more."""
        rounded = max(ALLOCATION_BYTES, 1 << (size_bytes - 1).bit_length())
        with self._lock:
            idle = self._idle.get(rounded)
            if idle:
                return IoBlock(idle.pop())
        from xditd.ipc.transports.host_shm import HostArena

        return IoBlock(HostArena(rounded, name="xditd-io"))

    def give_back(self, block: IoBlock) -> None:
        """Put a block back for the next job. No worker may still write to it."""
        with self._lock:
            idle = self._idle.setdefault(block.arena.size_bytes, [])
            if not self._is_closed and len(idle) < _IDLE_BLOCKS_OF_A_SIZE:
                idle.append(block.arena)
                return
        block.arena.close()

    def drop(self, block: IoBlock) -> None:
        """Unmap a block that a worker may still write to. Workers notice that it is closed, and unmap it too."""
        block.arena.close()

    def close(self) -> None:
        """Unmap the idle blocks; blocks in use are unmapped when they are given back."""
        with self._lock:
            self._is_closed = True
            arenas = [arena for idle in self._idle.values() for arena in idle]
            self._idle.clear()
        for arena in arenas:
            arena.close()
