"""Bytes that lie on one rank's GPU, brought onto the other ranks': one copy each, over NVLink or PCIe.

They are blocks that a client lent, or what a rank uploaded of a buffer that all ranks need. Two ranks whose GPUs reach
each other's memory open a handle of it where the bytes are needed and copy from there; all others broadcast. Which way
it is, all ranks agree on. docs/decisions/0004 has the reasons.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Final, NamedTuple

import msgspec
import torch
import torch.distributed as dist

from xditd.gpu_workers.parallel import exchange
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import agree, gather_bytes, raise_on_all_ranks
from xditd.gpu_workers.parallel.upload_partition import SHARED_FROM_BYTES, split
from xditd.ipc.errors import StaleSource, XditdError
from xditd.ipc.tensors import Block, CudaIpcBlock
from xditd.ipc.transports.cuda_ipc import CudaMapping, export_allocation, segment_of, wrap_segment
from xditd.ipc.transports.fingerprints import check_fingerprint

logger = logging.getLogger(__name__)

_MOST_BLOCK_BYTES: Final = 1024
"""Of a description of device memory, encoded: some 300."""


_PARTS: Final = 4
"""Of a share: all but the last are fetched while others are uploaded."""

Upload = Callable[[Sequence[range]], Generator[None, None, None]]
"""Fills ranges of a buffer from the host, one after the other, and yields after each, once work that is then issued on
the current stream sees it. Closing it ends all reading and writing."""


class _PeerPart(NamedTuple):
    """A share of a buffer that another rank has uploaded: its memory, and where the share begins in there."""

    mapping: CudaMapping
    share: range
    at: int

    def fetch(self, part: range, buffer: torch.Tensor) -> None:
        """Begin to copy part of the share to where it belongs in this rank's own buffer."""
        self.mapping.copy_to(buffer.narrow(0, part.start, len(part)), self.at + part.start - self.share.start)


class GpuCopies:
    """What ranks get from each other of a component. Every rank makes the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, peer_uuids: tuple[str, ...]) -> None:
        self._device = layout.device
        self._rank = layout.rank
        self._ranks = layout.world_size
        self._peer_uuids = peer_uuids
        self.is_direct = layout.device.type == "cuda" and layout.world_size == 2 and exchange.is_possible(2)
        """Whether ranks try to copy from the lender's memory; where that fails, they broadcast all the same."""

    @contextmanager
    def delivering(
        self,
        blocks: Sequence[Block],
        sources: Sequence[torch.Tensor],
        missing: Mapping[int, torch.Tensor],
        mark: Callable[[str], None],
    ) -> Iterator[None]:
        """Fill what is missing here, and give the others what is missing there, while the ``with`` block runs.

        The bytes are there when the block has been left. ``mark`` ends a phase for the lend's timings: ``peer_open``,
        ``peer_copy`` (or a broadcast; what the block did meanwhile is in it) and ``peer_close``.

        ``sources`` are this rank's bytes (1-D uint8) of each block: what is mapped from its own GPU, or the buffers
        that are to be filled, which are ``missing``, too, by number of block. Every rank has opened the blocks of its
        own GPU by then, so that what is stale or too short has been refused already.
        """
        wanted = {number: block for number, block in enumerate(blocks) if isinstance(block, CudaIpcBlock)}
        if self._ranks == 1 or not wanted:
            yield
            return
        with ExitStack() as opened:
            if not (self.is_direct and self._copy(wanted, missing, opened, mark)):
                for number, block in wanted.items():
                    dist.broadcast(sources[number], src=self._peer_uuids.index(block.device_uuid))
            yield
            torch.cuda.synchronize(self._device)  # "prepared" means that the bytes are here
            mark("peer_copy")

    def fill(self, buffer: torch.Tensor, upload: Upload, mark: Callable[[str], None]) -> range:
        """Fill a buffer (1-D uint8) that all ranks need alike; return which of its bytes this rank uploaded.

        Of a large one each rank uploads a share, and gets the others' from their GPUs: meanwhile, part by part, where
        two of them reach each other's memory, and by broadcasts afterwards where they do not. On return the bytes are
        there, and nobody maps the buffer any more. All ranks fail together. ``mark`` is that of :meth:`delivering`;
        ``copy`` is the upload, with all that other ranks sent meanwhile.

        Raises:
            OtherRankFailed, Internal: a copy failed, here or there.
            StaleSource and others: what ``upload`` raises.
        """
        size_bytes = buffer.numel()
        if self._device.type != "cuda" or self._ranks == 1 or size_bytes < SHARED_FROM_BYTES:
            with raise_on_all_ranks(), closing(upload([range(size_bytes)])) as uploaded:
                deque(uploaded, maxlen=0)
            mark("copy")
            return range(size_bytes)
        shares = split(range(size_bytes), self._ranks)
        if not self._upload_and_swap(buffer, shares, upload, mark):
            for rank, share in enumerate(shares):
                if share:  # NCCL connects all ranks at their first collective, which takes its time and keeps memory
                    dist.broadcast(buffer.narrow(0, share.start, len(share)), src=rank)
            torch.cuda.synchronize(self._device)  # "prepared" means that the bytes are here
            mark("peer_copy")
        return shares[self._rank]

    def _upload_and_swap(
        self, buffer: torch.Tensor, shares: Sequence[range], upload: Upload, mark: Callable[[str], None]
    ) -> bool:
        """Upload this rank's share; ``True``, on both, if the other rank's came from its memory, as it did from here.

        Either way, and with an error too, both have closed the other's memory before one goes on and may free its own.
        Whatever may fail on one rank alone lies between two agreements, so that both leave at the same one.
        """
        count = _PARTS if self.is_direct else 1
        mine = split(shares[self._rank], count)
        theirs = split(shares[1 - self._rank], count) if self.is_direct else []
        peer: _PeerPart | None = None
        with raise_on_all_ranks(), ExitStack() as opened:
            uploaded = opened.enter_context(closing(upload(mine)))
            for number in range(count):
                with raise_on_all_ranks():
                    if peer is not None:
                        peer.fetch(theirs[number - 1], buffer)
                    next(uploaded)
                    torch.cuda.current_stream(self._device).synchronize()
                if number == 0 and self.is_direct:
                    opened.callback(mark, "peer_close")
                    block = self._exchange_blocks(buffer, shares[self._rank])
                    peer = self._open_peer(block, shares[1 - self._rank], buffer, opened)
                    if not agree(peer is not None):
                        peer = None
            with raise_on_all_ranks():
                deque(uploaded, maxlen=0)  # what it checks when all is read
                mark("copy")
                if peer is not None:
                    peer.fetch(theirs[-1], buffer)
                    torch.cuda.synchronize(self._device)
                    mark("peer_copy")
        return peer is not None

    def _exchange_blocks(self, buffer: torch.Tensor, share: range) -> CudaIpcBlock | None:
        """Tell the other rank which memory this one's share lies in, and return what the other rank says of its own.

        A fingerprint is of the first bytes of a share, and says where in the allocation it begins. ``None`` is memory
        that CUDA gives no handle for.
        """
        mine: CudaIpcBlock | None = None
        try:
            base, size = segment_of(buffer)  # torch's allocator may have put the buffer into a larger allocation
            whole = wrap_segment(base, size, self._device.index)
            at = buffer.data_ptr() - base + share.start
            mine = export_allocation(base, whole, self._device.index, at)
        except XditdError as error:  # whichever it is, the other rank waits to be told
            logger.warning("uploads cannot be copied from here reason=%s", error.detail)
        both = gather_bytes(msgspec.msgpack.encode(mine), _MOST_BLOCK_BYTES, self._ranks)
        return msgspec.msgpack.decode(both[1 - self._rank], type=CudaIpcBlock | None)

    def _open_peer(
        self, block: CudaIpcBlock | None, share: range, buffer: torch.Tensor, opened: ExitStack
    ) -> _PeerPart | None:
        """Open the other rank's memory, for ``opened`` to close; ``None`` where that fails, or shows other bytes."""
        if block is None:
            return None
        try:
            sample = block.fingerprint
            mapping = CudaMapping(block, self._device.index)
            opened.callback(mapping.close)
            peer = _PeerPart(mapping, share, sample.offset_bytes)
            peer.fetch(share[: sample.length_bytes], buffer)
            sample = msgspec.structs.replace(sample, offset_bytes=share.start)
            check_fingerprint(buffer, sample, f"GPU {block.device_uuid}, seen from another GPU")
        except XditdError as error:  # whichever it is, the other rank waits for an answer
            logger.warning("no peer copy, uploads are broadcast reason=%s", error.detail)
            return None
        return peer

    def _copy(
        self,
        blocks: Mapping[int, CudaIpcBlock],
        missing: Mapping[int, torch.Tensor],
        opened: ExitStack,
        mark: Callable[[str], None],
    ) -> bool:
        """Begin to copy from the lender's memory, for ``opened`` to close; ``False``, on every rank, if one cannot."""
        opened.callback(mark, "peer_close")
        mappings: dict[int, CudaMapping] = {}
        fault = self._open(blocks, missing, mappings, opened)
        if fault:
            logger.warning("no peer copy, blocks are broadcast reason=%s", fault)
        if not agree(not fault):
            opened.close()
            return False
        mark("peer_open")
        for number, mapping in mappings.items():
            mapping.copy_to(missing[number], 0)
        return True

    def _open(
        self,
        blocks: Mapping[int, CudaIpcBlock],
        missing: Mapping[int, torch.Tensor],
        mappings: dict[int, CudaMapping],
        opened: ExitStack,
    ) -> str:
        """Open the lender's handle of each block that is missing here; return why one cannot be used, or nothing.

        The rank on the lender's GPU has opened the handle already. Where it fails here, or other bytes are seen, the
        path between the GPUs is at fault (an IOMMU, a driver), or the lender has just died.
        """
        try:
            for number, target in missing.items():
                block = blocks[number]
                # The current GPU is this rank's own, so that no context appears on the lender's.
                mapping = mappings[number] = CudaMapping(block, self._device.index)
                opened.callback(mapping.close)
                sample = block.fingerprint
                mapping.copy_to(target.narrow(0, sample.offset_bytes, sample.length_bytes), sample.offset_bytes)
                check_fingerprint(target, sample, f"GPU {block.device_uuid}, seen from another GPU")
        except StaleSource as error:
            return error.detail
        return ""
