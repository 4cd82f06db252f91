"""Blocks of this process's device memory for the large tensors of calls, and a pool of them.

A block is exported once. Its first bytes are random and never change: by their fingerprint the workers know a block
that they have mapped, and notice memory that was freed and allocated again. A block that is no longer used is retired:
the next call asks the workers to unmap it, and it is freed after that call.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from xditd.client.io_places import FINGERPRINTED_BYTES
from xditd.ipc import limits
from xditd.ipc.errors import Internal, OutOfMemory, Unsupported
from xditd.ipc.tensors import CudaIpcBlock, IoTensor
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, align, torch_dtype

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_IDLE_BLOCKS_OF_A_GPU: Final = 2
KEPT_FREE_BYTES: Final = 2**30
"""A block must leave this much of the GPU free, since the program around this library allocates there, too."""


class DeviceBlock:
    """The block of device memory of one call."""

    def __init__(self, size_bytes: int, index: int) -> None:
        """Allocate and export device memory.

        Raises:
            OutOfMemory: the GPU has too little free memory.
            Unsupported: its memory cannot be exported, or cuda-bindings is not installed.
        """
        import torch

        from xditd.ipc.transports.cuda_ipc import DeviceArena

        self.index = index
        self._arena = DeviceArena(size_bytes, index)
        try:
            tag = torch.frombuffer(bytearray(os.urandom(FINGERPRINTED_BYTES)), dtype=torch.uint8)
            self._arena.bytes[:FINGERPRINTED_BYTES].copy_(tag)
            self.description: CudaIpcBlock = self._arena.block()
        except BaseException:
            self._arena.close()
            raise

    @property
    def size_bytes(self) -> int:
        return self._arena.size_bytes

    def write(self, place: IoTensor, tensor: torch.Tensor) -> None:
        """Begin to copy a tensor of this GPU into the block; :meth:`wait` until it is complete."""
        self._view(place).copy_(tensor.detach())

    def read(self, place: IoTensor, device: torch.device) -> torch.Tensor:
        """Begin to copy a tensor out of the block; :meth:`wait` before the block is given back."""
        end = place.offset_bytes + place.size_bytes
        if end > self.size_bytes:
            raise Internal(f"a result ends at byte {end} of a block of device memory of {self.size_bytes}")
        return self._view(place).to(device, copy=True)

    def wait(self) -> None:
        """Wait for the copies that this thread has begun."""
        import torch

        torch.cuda.current_stream(self.index).synchronize()

    def close(self) -> None:
        """Free the memory. No worker may still map it."""
        self._arena.close()

    def _view(self, place: IoTensor) -> torch.Tensor:
        return self._arena.tensor(place.offset_bytes, torch_dtype(place.dtype), place.shape)


class DevicePool:
    """Idle and retired blocks of device memory. Safe to use from several threads."""

    def __init__(self) -> None:
        self._idle: dict[int, list[DeviceBlock]] = {}
        self._retired: list[DeviceBlock] = []
        self._not_exportable: set[int] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def idle_bytes(self) -> int:
        """The size of the blocks that wait for the next call."""
        with self._lock:
            return sum(each.size_bytes for idle in self._idle.values() for each in idle)

    def borrow(self, size_bytes: int, index: int) -> DeviceBlock | None:
        """Take a block of at least ``size_bytes`` on a GPU; ``None`` if it has no room, or cannot be shared."""
        with self._lock:
            if self._is_closed or index in self._not_exportable:
                return None
            idle = self._idle.setdefault(index, [])
            fitting = [each for each in idle if each.size_bytes >= size_bytes]
            if fitting:
                best = min(fitting, key=lambda each: each.size_bytes)
                idle.remove(best)
                return best
        block = self._allocate(size_bytes, index)
        if block is not None:
            with self._lock:  # the others are too small for the calls that are made now
                self._retired += self._idle.pop(index, [])
        return block

    def give_back(self, block: DeviceBlock) -> None:
        """Put a block back for the next call. No worker may still write to it."""
        with self._lock:
            if not self._is_closed:
                idle = self._idle.setdefault(block.index, [])
                idle.append(block)
                idle.sort(key=lambda each: each.size_bytes)
                while len(idle) > _IDLE_BLOCKS_OF_A_GPU:
                    self._retired.append(idle.pop(0))
                return
        block.close()

    def retire(self, block: DeviceBlock) -> None:
        """Give up a block that a worker may still map or write to."""
        with self._lock:
            if not self._is_closed:
                self._retired.append(block)
                return
        block.close()

    def take_retired(self) -> list[DeviceBlock]:
        """Take the retired blocks: a call asks the workers to unmap them. Then close them, or retire them again."""
        with self._lock:
            taken = self._retired[: limits.MAX_DROPPED_BLOCKS]
            del self._retired[: len(taken)]
            return taken

    def close(self) -> None:
        """Free all blocks that are not in use. No worker may map one."""
        with self._lock:
            self._is_closed = True
            blocks = [*self._retired, *(each for idle in self._idle.values() for each in idle)]
            self._retired.clear()
            self._idle.clear()
        for block in blocks:
            block.close()

    def _allocate(self, size_bytes: int, index: int) -> DeviceBlock | None:
        import torch

        step = max(ALLOCATION_BYTES, (1 << size_bytes.bit_length()) // 16)  # calls of similar sizes share a block
        rounded = align(size_bytes, step)
        try:
            if torch.cuda.mem_get_info(index)[0] >= rounded + KEPT_FREE_BYTES:
                return DeviceBlock(rounded, index)
        except OutOfMemory:
            pass
        except Unsupported as error:
            logger.info("calls from GPU %d go through host memory reason=%s", index, error.detail)
            self._not_exportable.add(index)
        return None
