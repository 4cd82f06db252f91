"""Copy bytes from one rank's GPU to the other ranks' GPUs: one copy each, over NVLink or PCIe.

They are lent blocks, or the shares of a buffer that each rank has uploaded. Ranks with peer access copy from each
other's memory; otherwise they broadcast. All ranks agree on the way. Reasons: docs/decisions/0004.
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

from xditd.gpu_workers.parallel import peer_memory
from xditd.gpu_workers.parallel.copy_chain import MAX_BLOCK_BYTES, CopyChain, export_buffer
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import agree, gather_bytes, raise_on_all_ranks
from xditd.gpu_workers.parallel.upload_partition import SHARED_FROM_BYTES, split
from xditd.ipc.errors import XditdError
from xditd.ipc.tensors import Block, CudaIpcBlock
from xditd.ipc.transports.cuda_ipc import CudaMapping
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES, check_fingerprint

logger = logging.getLogger(__name__)

_PARTS: Final = 4
"""Parts of a share: all but the last are fetched from its rank while the next is uploaded."""

Upload = Callable[[Sequence[range]], Generator[None, None, None]]
"""Fills ranges of a buffer from the host, and yields after each, in the order of the current stream. Closing it stops
all reads and writes."""


class _PeerPart(NamedTuple):
    """A share of a buffer that another rank has uploaded; it begins at byte ``at`` of ``mapping``."""

    mapping: CudaMapping
    share: range
    at: int

    def fetch(self, part: range, buffer: torch.Tensor) -> None:
        """Begin to copy part of the share to its place in this rank's own buffer."""
        self.mapping.copy_to(buffer.narrow(0, part.start, len(part)), self.at + part.start - self.share.start)


class GpuCopies:
    """Copies between the GPUs of a group. Every rank makes the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, peer_uuids: tuple[str, ...]) -> None:
        self.device = layout.device
        self.rank = layout.rank
        self.ranks = layout.world_size
        self.peer_uuids = peer_uuids
        self.is_direct = (
            layout.device.type == "cuda" and layout.world_size > 1 and peer_memory.is_possible(layout.world_size)
        )
        """Whether ranks try peer copies; if one fails, they broadcast."""

    @contextmanager
    def copy_blocks(
        self,
        blocks: Sequence[Block],
        sources: Sequence[torch.Tensor],
        missing: Mapping[int, torch.Tensor],
        mark: Callable[[str], None],
        parts: Mapping[int, Sequence[range]] | None = None,
    ) -> Iterator[None]:
        """Copy lent blocks from the GPU of each to the other ranks, while the ``with`` block runs.

        The copies have finished when the block is left. Then, and after errors, all ranks have closed the others'
        memory, so that each may free its own. The block raises on all ranks or on none. ``mark`` ends a phase of the
        lend's timings: ``peer_open``, ``peer_copy`` (or a broadcast; includes the work of the block), ``peer_close``.

        ``sources`` are the bytes (1-D uint8) of each block: a mapping of this rank's GPU, or a buffer to fill. The
        latter are ``missing``, too, by number of block. Every rank has opened and checked the blocks of its own GPU.
        With ``parts`` only these bytes of the blocks are copied; they are the same on all ranks.
        """
        wanted = {number: block for number, block in enumerate(blocks) if isinstance(block, CudaIpcBlock)}
        if self.ranks == 1 or not wanted:
            yield
            return
        copied = {
            number: [range(block.size_bytes)] if parts is None else parts.get(number, ())
            for number, block in wanted.items()
        }
        with raise_on_all_ranks(), ExitStack() as opened:
            chain = self._open_chain(wanted, missing, opened, mark) if self.is_direct else None
            if chain is not None:
                with raise_on_all_ranks():
                    chain.start(copied)
            else:
                for number, block in wanted.items():
                    owner = self.peer_uuids.index(block.device_uuid)
                    for part in copied[number]:
                        dist.broadcast(sources[number].narrow(0, part.start, len(part)), src=owner)
            yield
            with raise_on_all_ranks():  # "prepared" means that the bytes are here
                if chain is not None:
                    chain.finish()
                else:
                    torch.cuda.synchronize(self.device)
            mark("peer_copy")

    def fill(self, buffer: torch.Tensor, upload: Upload, mark: Callable[[str], None]) -> range:
        """Fill a buffer (1-D uint8) with the same bytes on all ranks; return the range that this rank uploaded.

        Each rank uploads a share of a large buffer. Ranks with peer access copy each other's shares meanwhile, part by
        part; otherwise the shares are broadcast afterwards. On return the buffer is filled, and no rank maps it any
        more. All ranks fail together. ``mark`` is that of :meth:`copy_blocks`; its phase ``copy`` is the upload with
        the peer copies meanwhile.

        Raises:
            OtherRankFailed, Internal: a copy failed, on this rank or another.
            StaleSource and others: errors of ``upload``.
        """
        size_bytes = buffer.numel()
        if self.device.type != "cuda" or self.ranks == 1 or size_bytes < SHARED_FROM_BYTES:
            with raise_on_all_ranks(), closing(upload([range(size_bytes)])) as uploaded:
                deque(uploaded, maxlen=0)
            mark("copy")
            return range(size_bytes)
        shares = split(range(size_bytes), self.ranks)
        if not self._upload_and_exchange(buffer, shares, upload, mark):
            for rank, share in enumerate(shares):
                if share:  # NCCL's first collective takes time and memory
                    dist.broadcast(buffer.narrow(0, share.start, len(share)), src=rank)
            torch.cuda.synchronize(self.device)  # "prepared" means that the bytes are here
            mark("peer_copy")
        return shares[self.rank]

    def _upload_and_exchange(
        self, buffer: torch.Tensor, shares: Sequence[range], upload: Upload, mark: Callable[[str], None]
    ) -> bool:
        """Upload this rank's share; return whether all ranks copied the others' shares by peer access.

        On return and after errors, all have closed the others' memory, so that each may free its own. They agree after
        every operation that may fail on one alone, so that all leave at the same point.
        """
        count = _PARTS if self.is_direct else 1
        parts = [split(share, count) for share in shares]
        peers: Mapping[int, _PeerPart] | None = None
        with raise_on_all_ranks(), ExitStack() as opened:
            uploaded = opened.enter_context(closing(upload(parts[self.rank])))
            for number in range(count):
                with raise_on_all_ranks():
                    if peers is not None:
                        for rank, peer in peers.items():
                            peer.fetch(parts[rank][number - 1], buffer)
                    next(uploaded)
                    torch.cuda.current_stream(self.device).synchronize()
                if number == 0 and self.is_direct:
                    opened.callback(mark, "peer_close")
                    peers = self._open_peers(self._exchange_blocks(buffer, shares), shares, buffer, opened)
                    if not agree(peers is not None):
                        peers = None
            with raise_on_all_ranks():
                deque(uploaded, maxlen=0)  # its checks at the end
                mark("copy")
                if peers is not None:
                    for rank, peer in peers.items():
                        peer.fetch(parts[rank][-1], buffer)
                    torch.cuda.synchronize(self.device)
                    mark("peer_copy")
        return peers is not None

    def _exchange_blocks(self, buffer: torch.Tensor, shares: Sequence[range]) -> list[CudaIpcBlock | None]:
        """Exchange handles of all ranks' shares; return those of all.

        Their fingerprints are of the first bytes of the shares, and have their offset in the allocation. ``None``: CUDA
        gives no handle for that memory.
        """
        mine: CudaIpcBlock | None = None
        try:
            mine = export_buffer(buffer, shares[self.rank].start, SAMPLE_BYTES, self.device)
        except XditdError as error:  # the other ranks wait for the exchange
            logger.warning("no peer copy from this rank, uploads are broadcast reason=%s", error.detail)
        everyone = gather_bytes(msgspec.msgpack.encode(mine), MAX_BLOCK_BYTES, self.ranks)
        return [msgspec.msgpack.decode(each, type=CudaIpcBlock | None) for each in everyone]

    def _open_peers(
        self,
        blocks: Sequence[CudaIpcBlock | None],
        shares: Sequence[range],
        buffer: torch.Tensor,
        opened: ExitStack,
    ) -> dict[int, _PeerPart] | None:
        """Open the other ranks' memory; ``opened`` closes it. ``None`` if that fails, or bytes are wrong.

        The next rank is the first, so that not all read the same GPU at once.
        """
        peers: dict[int, _PeerPart] = {}
        for step in range(1, self.ranks):
            rank = (self.rank + step) % self.ranks
            block, share = blocks[rank], shares[rank]
            if not share:
                continue
            if block is None:
                return None
            try:
                sample = block.fingerprint
                mapping = CudaMapping(block, self.device.index)
                opened.callback(mapping.close)
                peer = peers[rank] = _PeerPart(mapping, share, sample.offset_bytes)
                peer.fetch(share[: sample.length_bytes], buffer)
                sample = msgspec.structs.replace(sample, offset_bytes=share.start)
                check_fingerprint(buffer, sample, f"GPU {block.device_uuid}, seen from another GPU")
            except XditdError as error:  # the other ranks wait in agree()
                logger.warning("no peer copy, uploads are broadcast reason=%s", error.detail)
                return None
        return peers

    def _open_chain(
        self,
        blocks: Mapping[int, CudaIpcBlock],
        missing: Mapping[int, torch.Tensor],
        opened: ExitStack,
        mark: Callable[[str], None],
    ) -> CopyChain | None:
        """Open what each rank reads; ``opened`` closes it. ``None`` on every rank if one cannot."""
        opened.callback(mark, "peer_close")
        with raise_on_all_ranks():
            chain = CopyChain(self.device, self.rank, self.peer_uuids, blocks, missing)
        opened.callback(chain.close)
        fault = chain.open()
        if fault:
            logger.warning("no peer copy, blocks are broadcast reason=%s", fault)
        if not agree(not fault):
            opened.close()
            return None
        mark("peer_open")
        return chain
