"""Ulysses without all-to-alls: kernels store heads and tokens directly into the memory of the rank that needs them.

With two barriers per layer one set of buffers is enough: after the second, all attention of the layer has read its
input; after the first, all projections of the layer before have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.peer_memory import PeerMemory
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.ipc.transports.tensor_views import align


class Exchange:
    """The shared buffers of a sequence-parallel ``group``, whose ranks make the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, group: dist.ProcessGroup) -> None:
        self._layout = layout
        self._group = group
        self._memory: PeerMemory | None = None
        self._tokens_bases = torch.empty(0)
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
        heads_bytes = align(3 * ranks * rows_a_rank * (width // ranks) * dtype.itemsize)
        tokens_bytes = align(rows_a_rank * width * dtype.itemsize)
        if heads_bytes > self._capacity[0] or tokens_bytes > self._capacity[1]:
            self._grow(max(heads_bytes, self._capacity[0]), max(tokens_bytes, self._capacity[1]))
        assert self._memory is not None
        heads = self._memory.tensor(0, dtype, (3, ranks * rows_a_rank, width // ranks))
        tokens = self._memory.tensor(self._capacity[0], dtype, (rows_a_rank, width))
        return Buffers(heads, tokens, self._memory.addresses, self._tokens_bases)

    def barrier(self) -> None:
        """Wait, on the GPU, for all ranks: later loads see the earlier stores of every rank."""
        assert self._memory is not None
        self._memory.barrier()

    def close(self) -> None:
        """Unmap the other ranks' buffers, then free this rank's own."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._capacity = (0, 0)

    def _grow(self, heads_bytes: int, tokens_bytes: int) -> None:
        self.close()
        self._memory = PeerMemory(
            heads_bytes + tokens_bytes,
            self._layout.device,
            self._layout.sequence_rank,
            self._layout.degrees.sequence,
            self._group,
            RankSet.SEQUENCE,
        )
        self._tokens_bases = self._memory.addresses + heads_bytes
        self._capacity = (heads_bytes, tokens_bytes)
        torch.cuda.synchronize(self._layout.device)


class Buffers(NamedTuple):
    """The receive buffers of one rank: ``heads`` (3, all rows, own heads * 128), ``tokens`` (own rows, width).

    ``heads_bases`` and ``tokens_bases`` are the addresses of the buffers of all ranks.
    """

    heads: torch.Tensor
    tokens: torch.Tensor
    heads_bases: torch.Tensor
    tokens_bases: torch.Tensor
