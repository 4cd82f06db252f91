"""Ulysses without all-to-alls: kernels store heads and tokens directly into the memory of the rank that needs them.

Each rank owns one arena, which the other ranks of its sequence open by CUDA IPC; gloo carries the handles as bytes.
NVLink multicast is not used. With two barriers per layer one set of buffers is enough: after the second, all attention
of the layer has read its input; after the first, all projections of the layer before have.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist

from xditd.gpu_workers.kernels import triton_kernels
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import RankSet, agree, raise_on_all_ranks
from xditd.ipc.transports.cuda_ipc import CudaMapping, DeviceArena
from xditd.ipc.transports.tensor_views import align

FLAGS_BYTES = 4096
_ALIGNMENT = 256


class Exchange:
    """The shared buffers of a sequence-parallel ``group``, whose ranks make the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, group: dist.ProcessGroup) -> None:
        self._layout = layout
        self._group = group
        self._arena: DeviceArena | None = None
        self._mappings: list[CudaMapping | None] = []
        self._addresses = torch.empty(0)
        self._capacity = (0, 0)

    @property
    def capacity(self) -> tuple[int, int]:
        """The sizes of the buffers, in bytes; buffers of other sizes are at other addresses."""
        return self._capacity

    def reserve(self, rows_a_rank: int, width: int, dtype: torch.dtype) -> Buffers:
        """Return buffers for ``rows_a_rank`` tokens of ``width`` numbers on every rank; reallocate them if too small.

        They are valid until the next call.
        """
        ranks = self._layout.degrees.sequence
        heads_bytes = align(3 * ranks * rows_a_rank * (width // ranks) * dtype.itemsize, _ALIGNMENT)
        tokens_bytes = align(rows_a_rank * width * dtype.itemsize, _ALIGNMENT)
        if heads_bytes > self._capacity[0] or tokens_bytes > self._capacity[1]:
            self._grow(max(heads_bytes, self._capacity[0]), max(tokens_bytes, self._capacity[1]))
        assert self._arena is not None
        heads = self._arena.tensor(FLAGS_BYTES, dtype, (3, ranks * rows_a_rank, width // ranks))
        tokens = self._arena.tensor(FLAGS_BYTES + self._capacity[0], dtype, (rows_a_rank, width))
        return Buffers(heads, tokens, self._addresses[1], self._addresses[2])

    def barrier(self) -> None:
        """Wait, on the GPU, for all ranks: later loads see the earlier stores of every rank."""
        triton_kernels.barrier(bases=self._addresses[0], rank=self._layout.sequence_rank)

    def close(self) -> None:
        """Unmap the other ranks' buffers, then free this rank's own."""
        torch.cuda.synchronize(self._layout.device)
        for mapping in self._mappings:
            if mapping is not None:
                mapping.close()
        self._mappings = []
        agree(True, RankSet.SEQUENCE)  # free memory only when no rank has it mapped
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _grow(self, heads_bytes: int, tokens_bytes: int) -> None:
        self.close()
        index = self._layout.device.index
        self._capacity = (0, 0)
        with raise_on_all_ranks(RankSet.SEQUENCE):
            self._arena = DeviceArena(FLAGS_BYTES + heads_bytes + tokens_bytes, index)
        self._arena.bytes[:FLAGS_BYTES].zero_()
        own = self._arena.block()
        handles = [torch.empty(len(own.handle), dtype=torch.uint8) for _ in range(self._layout.degrees.sequence)]
        dist.all_gather(handles, torch.tensor(list(own.handle), dtype=torch.uint8), group=self._group)
        with raise_on_all_ranks(RankSet.SEQUENCE):
            self._mappings = [
                None
                if rank == self._layout.sequence_rank
                else CudaMapping(msgspec.structs.replace(own, handle=bytes(handle.tolist())), index)
                for rank, handle in enumerate(handles)
            ]
        bases = [
            (self._arena.bytes if mapping is None else mapping.bytes_tensor()).data_ptr() for mapping in self._mappings
        ]
        offsets = (0, FLAGS_BYTES, FLAGS_BYTES + heads_bytes)
        self._addresses = torch.tensor([[base + offset for base in bases] for offset in offsets]).to(
            self._layout.device
        )
        self._capacity = (heads_bytes, tokens_bytes)
        torch.cuda.synchronize(index)
        agree(True, RankSet.SEQUENCE)  # all flags are zero before a rank sets one


class Buffers(NamedTuple):
    """The receive buffers of one rank: ``heads`` (3, all rows, own heads * 128), ``tokens`` (own rows, width).

    ``heads_bases`` and ``tokens_bases`` are the addresses of the buffers of all ranks.
    """

    heads: torch.Tensor
    tokens: torch.Tensor
    heads_bases: torch.Tensor
    tokens_bases: torch.Tensor


def is_possible(world_size: int) -> bool:
    """Return whether all GPUs of the group (GPU N for rank N) have peer access to each other."""
    pairs = ((one, other) for one in range(world_size) for other in range(world_size) if one != other)
    return world_size <= torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(one, other) for one, other in pairs
    )
