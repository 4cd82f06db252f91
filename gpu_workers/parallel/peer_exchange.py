"""Ulysses of the attentions of any class by kernels that store into the memory of other ranks, in place of all-to-alls.

Queries, keys and values go to their rank as they are, without being packed before or unpacked after, and one kernel
sends all three. The two barriers of an attention order it: after the first, all have arrived; after the second, every
rank has attended, and its results have arrived. Heads and tokens arrive in memory of their own, so that tokens of one
attention may be read while heads of the next one arrive.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Final

import torch

from xditd.gpu_workers.kernels import peer_kernels
from xditd.gpu_workers.parallel.peer_memory import PeerMemory
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.ipc.errors import OtherRankFailed, OutOfMemory, StaleSource, Unsupported
from xditd.ipc.transports.tensor_views import align

logger = logging.getLogger(__name__)

HEADS_BYTES: Final = tuple(12 * 2**20 << level for level in range(5))
"""Sizes of the memory in which heads arrive, up to 192 MiB; that of tokens is a third of it, since queries, keys and
values are as large as three results. Each is allocated once and stays: captured forwards have its addresses. What is
larger is exchanged by all-to-alls, which then take little more time."""


class PeerExchange:
    """The exchange of all ranks of the group, over GPUs with peer access. All make the same calls in the same order.

    Its memory stays until the process ends.
    """

    def __init__(self, device: torch.device, rank: int, ranks: int) -> None:
        self._device, self._rank, self._ranks = device, rank, ranks
        self._memory: dict[int, PeerMemory | None] = {}
        """By the bytes for heads; ``None`` if a GPU had no room for it, or could not map another one's."""
        self._ends: dict[tuple[int, ...], torch.Tensor] = {}

    def share_heads(
        self, tensors: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]
    ) -> list[torch.Tensor] | None:
        """Exchange this rank's tokens of several tensors for all tokens of its share of the heads.

        Tensors are (batch, own tokens, heads, head size), ``counts`` the tokens of each rank, for each tensor. The
        results are valid until the next call. ``None``, on all ranks, if they are too large.
        """
        groups = [
            [number for number, _ in found]
            for _, found in itertools.groupby(
                enumerate(tensors), lambda each: (each[1].shape[2:], each[1].dtype, tuple(counts[each[0]]))
            )
        ]
        shapes, offsets, end = [], [], 0
        for numbers in groups:
            first = tensors[numbers[0]]
            all_rows, heads = sum(counts[numbers[0]]), first.shape[2] // self._ranks
            shapes.append((len(numbers), first.shape[0], all_rows, heads, first.shape[3]))
            offsets.append(end)
            end = align(end + torch.Size(shapes[-1]).numel() * first.element_size())
        found = self._reserve(end)
        if found is None:
            return None
        memory, _ = found
        arrived: list[torch.Tensor] = []
        for numbers, shape, offset in zip(groups, shapes, offsets, strict=True):
            own = counts[numbers[0]]
            given = [each if each.stride(-1) == 1 else each.contiguous() for each in (tensors[n] for n in numbers)]
            peer_kernels.send_heads(
                given,
                bases=memory.addresses,
                offset_bytes=offset,
                first_row=sum(own[: self._rank]),
                all_rows=sum(own),
            )
            arrived += memory.tensor(offset, given[0].dtype, shape).unbind(0)
        memory.barrier()
        return arrived

    def return_tokens(self, attended: torch.Tensor, counts: Sequence[int]) -> torch.Tensor | None:
        """Exchange all tokens of this rank's heads for its own tokens of all heads, in a new tensor.

        ``None``, on all ranks, if they are too large.
        """
        batch, _, heads, head = attended.shape
        shape = (batch, counts[self._rank], self._ranks * heads, head)
        found = self._reserve(3 * batch * max(counts) * self._ranks * heads * head * attended.element_size())
        if found is None:
            return None
        memory, heads_bytes = found
        peer_kernels.send_tokens(
            attended if attended.stride(-1) == 1 else attended.contiguous(),
            bases=memory.addresses,
            ends=self._ends_of(tuple(counts)),
            offset_bytes=heads_bytes,
            rank=self._rank,
        )
        memory.barrier()
        return memory.tensor(heads_bytes, attended.dtype, shape).clone()

    def _reserve(self, heads_bytes: int) -> tuple[PeerMemory, int] | None:
        """Return memory with room for so many bytes of heads, or for a third of them of tokens, which come after them.

        The second is where they begin.
        """
        room = next((size for size in HEADS_BYTES if size >= heads_bytes), None)
        if room is None:
            return None
        if room not in self._memory:
            if torch.cuda.is_current_stream_capturing():
                raise Unsupported("an attention exchanges tokens of a size that no forward had before")
            try:
                size_bytes = room + room // 3
                memory = PeerMemory(size_bytes, self._device, self._rank, self._ranks, None, RankSet.GROUP)
            except (OutOfMemory, StaleSource, OtherRankFailed) as error:  # on all ranks
                logger.warning("attentions exchange tokens by all-to-alls bytes=%d reason=%s", room, error.detail)
                memory = None
            self._memory[room] = memory
        found = self._memory[room]
        return None if found is None else (found, room)

    def _ends_of(self, counts: tuple[int, ...]) -> torch.Tensor:
        if counts not in self._ends:
            self._ends[counts] = torch.tensor(list(itertools.accumulate(counts))).to(self._device)
        return self._ends[counts]
