"""Shared memory blocks that hold a job's input and output tensors, and a pool of them.

Each job takes its own block from the pool, so that jobs of several threads do not share one. Inputs come first,
outputs after them; both are copied, so that a block can be used for the next job at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xditd.client.device_blocks import DeviceBlock, DevicePool
from xditd.client.forks import maker_of_client
from xditd.ipc.arguments import InIo
from xditd.ipc.errors import Internal
from xditd.ipc.tensors import HostShmBlock, IoTensor
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES

if TYPE_CHECKING:
    import torch

    from xditd.ipc.transports.host_shm import HostArena

_IDLE_BLOCKS_OF_A_SIZE: Final = 4

_LARGE_BYTES: Final = 256 * 2**20
"""From here on, blocks of videos: their sizes are multiples of 64 MiB, since a power of two may waste half of what a
worker pins, and one stays idle in all, the last one."""

_LARGE_STEP_BYTES: Final = 64 * 2**20

_THREADED_FROM_BYTES: Final = 64 * 2**20
"""From here on, torch's threads copy faster than one, and that they are woken takes a small part of the time."""


class IoBlock:
    """The block of one job, and the block of device memory of a call with large tensors on a GPU."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.device: DeviceBlock | None = None
        self.dropped: list[DeviceBlock] = []
        """Blocks of device memory that the job's workers unmap."""

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

    def read_result(self, leaf: InIo, device: torch.device) -> torch.Tensor:
        """Copy a result of a call out of the block or the block of device memory, to memory that the caller owns."""
        if not leaf.in_device_io:
            return self.read(leaf.place, device)
        if self.device is None:
            raise Internal("a result of a call is in device memory, but the request gave no room there")
        return self.device.read(leaf.place, device)

    def describe(self) -> HostShmBlock:
        """Describe the block for a message. Call it after the inputs are written: it computes the fingerprint."""
        return self.arena.block()


def _rounded(size_bytes: int) -> int:
    if size_bytes >= _LARGE_BYTES:
        return -(-size_bytes // _LARGE_STEP_BYTES) * _LARGE_STEP_BYTES
    return max(ALLOCATION_BYTES, 1 << (size_bytes - 1).bit_length())


def _copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy contiguous host memory in this thread, not by torch, unless it is large.

    torch splits even a small copy over all its threads, and waking sixteen of them took 10 ms in a worker.
    """
    import ctypes

    if source.nbytes >= _THREADED_FROM_BYTES:
        target.copy_(source)
        return
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


class IoPool:
    """Idle blocks by size: powers of two, or multiples of 64 MiB. Safe to use from several threads."""

    def __init__(self) -> None:
        self._maker = maker_of_client()
        self.devices = DevicePool()
        self._idle: dict[int, list[HostArena]] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def borrow(self, size_bytes: int) -> IoBlock:
        """Take a block of at least ``size_bytes``. Give it back when no worker uses it any more.

        Raises:
            Unsupported: this is a fork of the process that made the client.
        """
        self._maker.check()
        rounded = _rounded(size_bytes)
        with self._lock:
            idle = self._idle.get(rounded)
            if idle:
                return IoBlock(idle.pop())
        from xditd.ipc.transports.host_shm import HostArena

        return IoBlock(HostArena(rounded, name="xditd-io"))

    def give_back(self, block: IoBlock) -> None:
        """Put a block back for the next job. No worker may still write to it."""
        self._leave_device(block, self.devices.give_back)
        size_bytes = block.arena.size_bytes
        freed = [block.arena]
        with self._lock:
            idle = self._idle.setdefault(size_bytes, [])
            if not self._is_closed and size_bytes >= _LARGE_BYTES:
                freed = [arena for size, each in self._idle.items() if size >= _LARGE_BYTES for arena in each]
                for size in [size for size in self._idle if size >= _LARGE_BYTES]:
                    del self._idle[size]
                self._idle[size_bytes] = [block.arena]
            elif not self._is_closed and len(idle) < _IDLE_BLOCKS_OF_A_SIZE:
                idle.append(block.arena)
                freed = []
        for arena in freed:
            arena.close()

    def drop(self, block: IoBlock) -> None:
        """Unmap a block that a worker may still write to. Workers notice that it is closed, and unmap it too."""
        self._leave_device(block, self.devices.retire)
        block.arena.close()

    def _leave_device(self, block: IoBlock, leave: Callable[[DeviceBlock], None]) -> None:
        device, block.device = block.device, None
        if device is not None:
            leave(device)
        while block.dropped:  # the workers may not have unmapped them: the next call asks again
            self.devices.retire(block.dropped.pop())

    def close(self) -> None:
        """Free the idle blocks; blocks in use are freed when they are given back. No worker may map device memory."""
        self.devices.close()
        with self._lock:
            self._is_closed = True
            arenas = [arena for idle in self._idle.values() for arena in idle]
            self._idle.clear()
        for arena in arenas:
            arena.close()
