"""Memory of each rank that kernels of the other ranks write to, and barriers of these kernels.

Each rank owns one arena, which the other ranks open by CUDA IPC; gloo carries the handles as bytes. NVLink multicast is
not used.
"""

from __future__ import annotations

import weakref
from typing import Final

import msgspec
import torch
import torch.distributed as dist

from xditd.gpu_workers.kernels import triton_kernels
from xditd.gpu_workers.parallel.rank_sync import RankSet, agree, raise_on_all_ranks
from xditd.ipc.transports.cuda_ipc import CudaMapping, DeviceArena

FLAGS_BYTES: Final = 4096


class PeerMemory:
    """``size_bytes`` of each of the ``ranks`` of a group, mapped by all of them. All make the same calls.

    ``among`` are the same ranks as ``group``, a process group that carries CPU tensors.

    Raises:
        OutOfMemory, OtherRankFailed: a GPU has too little memory.
        StaleSource, OtherRankFailed: a rank cannot map another one's memory.
    """

    def __init__(
        self,
        size_bytes: int,
        device: torch.device,
        rank: int,
        ranks: int,
        group: dist.ProcessGroup | None,
        among: RankSet,
    ) -> None:
        self._device, self._rank, self._among = device, rank, among
        self._arena: DeviceArena | None = None
        self._mappings: list[CudaMapping] = []
        _open.add(self)
        try:
            bases = self._open(size_bytes, ranks, group)
        except BaseException:
            self.close()
            raise
        self._flags = torch.tensor(bases).to(device)
        self.addresses = torch.tensor([base + FLAGS_BYTES for base in bases]).to(device)
        """Of the memory of each rank: int64 on this rank's GPU."""
        torch.cuda.synchronize(device)
        agree(True, among)  # all flags are zero before a rank sets one

    def tensor(self, offset_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """View part of this rank's own memory."""
        assert self._arena is not None
        return self._arena.tensor(FLAGS_BYTES + offset_bytes, dtype, shape)

    @property
    def size_bytes(self) -> int:
        """Of this rank's own memory."""
        return 0 if self._arena is None else self._arena.bytes.numel()

    def barrier(self) -> None:
        """Wait, on the GPU, for all ranks: later loads see the earlier stores of every rank."""
        triton_kernels.barrier(bases=self._flags, rank=self._rank)

    def close(self) -> None:
        """Unmap the other ranks' memory, then free this rank's own. Drop every view of it before."""
        torch.cuda.synchronize(self._device)
        while self._mappings:
            self._mappings.pop().close()
        agree(True, self._among)  # free memory only when no rank has it mapped
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _open(self, size_bytes: int, ranks: int, group: dist.ProcessGroup | None) -> list[int]:
        """Allocate this rank's memory and map that of the others; return the addresses of all."""
        index = self._device.index
        with raise_on_all_ranks(self._among):
            self._arena = DeviceArena(FLAGS_BYTES + size_bytes, index)
        self._arena.bytes[:FLAGS_BYTES].zero_()
        own = self._arena.block()
        handles = [torch.empty(len(own.handle), dtype=torch.uint8) for _ in range(ranks)]
        dist.all_gather(handles, torch.tensor(list(own.handle), dtype=torch.uint8), group=group)
        bases: list[int] = []
        with raise_on_all_ranks(self._among):
            for rank, handle in enumerate(handles):
                if rank == self._rank:
                    bases.append(self._arena.bytes.data_ptr())
                    continue
                self._mappings.append(CudaMapping(msgspec.structs.replace(own, handle=bytes(handle.tolist())), index))
                bases.append(self._mappings[-1].bytes_tensor().data_ptr())
        return bases


_open: Final[weakref.WeakSet[PeerMemory]] = weakref.WeakSet()


def total_bytes() -> int:
    """Return the bytes of all such memory that this process has allocated."""
    return sum(each.size_bytes for each in _open)


def is_possible(world_size: int) -> bool:
    """Return whether all GPUs of the group (GPU N for rank N) have peer access to each other."""
    pairs = ((one, other) for one in range(world_size) for other in range(world_size) if one != other)
    return world_size <= torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(one, other) for one, other in pairs
    )
