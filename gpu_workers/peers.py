"""Bytes that lie on one rank's GPU, brought onto the other ranks': one copy each, over NVLink or PCIe.

They are blocks that a client lent, or what a rank uploaded of a buffer that all ranks need. Two ranks whose GPUs reach
each other's memory open a handle of it where the bytes are needed and copy from there; all others broadcast. Which way
it is, all ranks agree on. docs/decisions/0004 has the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import msgspec
import torch
import torch.distributed as dist

from xditd.gpu_workers.agreement import agree
from xditd.gpu_workers.fellows import gather_bytes, together
from xditd.gpu_workers.fused import exchange
from xditd.gpu_workers.layouts import ParallelLayout
from xditd.gpu_workers.upload_shares import SHARED_FROM_BYTES, split
from xditd.ipc.errors import StaleSource, XditdError
from xditd.ipc.tensors import Block, CudaIpcBlock
from xditd.ipc.transports.cuda_ipc import CudaMapping, export_allocation, segment_of, wrap_segment
from xditd.ipc.transports.fingerprints import check_fingerprint

logger = logging.getLogger(__name__)

_MOST_BLOCK_BYTES: Final = 1024
"""Of a description of device memory, encoded: some 300."""


class PeerCopies:
    """What ranks get from each other of a component. Every rank makes the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, fellow_uuids: tuple[str, ...]) -> None:
        self._device = layout.device
        self._rank = layout.rank
        self._ranks = layout.world_size
        self._fellow_uuids = fellow_uuids
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
                    dist.broadcast(sources[number], src=self._fellow_uuids.index(block.device_uuid))
            yield
            torch.cuda.synchronize(self._device)  # "prepared" means that the bytes are here
            mark("peer_copy")

    def own_share(self, size_bytes: int) -> range:
        """Which bytes this rank uploads of a buffer that all ranks fill alike; :meth:`complete` brings the others."""
        return split(size_bytes, self._ranks)[self._rank] if self._is_shared(size_bytes) else range(size_bytes)

    def complete(self, buffer: torch.Tensor, mark: Callable[[str], None]) -> None:
        """Fill in what the others uploaded of ``buffer`` (1-D uint8), and give them this rank's share.

        The bytes are there on return, and nobody maps the buffer any more. Call once every rank is known to have
        uploaded its share; ``mark`` is that of :meth:`delivering`.

        Raises:
            OtherRankFailed, Internal: a copy failed, here or there.
        """
        if not self._is_shared(buffer.numel()):
            return
        shares = split(buffer.numel(), self._ranks)
        if self.is_direct and self._swap(buffer, shares, mark):
            return
        for rank, share in enumerate(shares):
            if share:  # NCCL connects all ranks at their first collective, which takes its time and keeps memory
                dist.broadcast(buffer.narrow(0, share.start, len(share)), src=rank)
        torch.cuda.synchronize(self._device)  # "prepared" means that the bytes are here
        mark("peer_copy")

    def _is_shared(self, size_bytes: int) -> bool:
        return self._device.type == "cuda" and self._ranks > 1 and size_bytes >= SHARED_FROM_BYTES

    def _swap(self, buffer: torch.Tensor, shares: Sequence[range], mark: Callable[[str], None]) -> bool:
        """Copy the fellow's share from its memory, as it does from here; ``False``, on both, where one cannot.

        Either way, and with an error too, both have closed the other's memory before one goes on and may free its own.
        """
        mine, theirs = shares[self._rank], shares[1 - self._rank]
        block = self._trade_blocks(buffer, mine)
        target = buffer.narrow(0, theirs.start, len(theirs))
        with together(), ExitStack() as opened:
            opened.callback(mark, "peer_close")
            mapping = self._open_fellow(block, target, opened)
            if not agree(mapping is not None):
                return False
            assert block is not None
            assert mapping is not None
            mark("peer_open")
            mapping.copy_to(target, block.fingerprint.offset_bytes)
            torch.cuda.synchronize(self._device)
            mark("peer_copy")
        return True

    def _trade_blocks(self, buffer: torch.Tensor, share: range) -> CudaIpcBlock | None:
        """Describe the memory that this rank's share lies in to the fellow, for the description of the fellow's.

        A fingerprint is of the first bytes of a share, and says where in the allocation it begins. ``None`` is memory
        that CUDA gives no handle for.
        """
        mine: CudaIpcBlock | None = None
        try:
            base, size = segment_of(buffer)  # torch's allocator may have put the buffer into a larger allocation
            whole = wrap_segment(base, size, self._device.index)
            at = buffer.data_ptr() - base + share.start
            mine = export_allocation(base, whole, self._device.index, at)
        except XditdError as error:  # whichever it is, the fellow waits to be told
            logger.warning("uploads cannot be copied from here reason=%s", error.detail)
        both = gather_bytes(msgspec.msgpack.encode(mine), _MOST_BLOCK_BYTES, self._ranks)
        return msgspec.msgpack.decode(both[1 - self._rank], type=CudaIpcBlock | None)

    def _open_fellow(self, block: CudaIpcBlock | None, target: torch.Tensor, opened: ExitStack) -> CudaMapping | None:
        """Open the fellow's memory, for ``opened`` to close; ``None`` where that fails, or shows other bytes."""
        if block is None:
            return None
        try:
            mapping = CudaMapping(block, self._device.index)
            opened.callback(mapping.close)
            sample = block.fingerprint
            mapping.copy_to(target.narrow(0, 0, sample.length_bytes), sample.offset_bytes)
            sample = msgspec.structs.replace(sample, offset_bytes=0)
            check_fingerprint(target, sample, f"GPU {block.device_uuid}, seen from another GPU")
        except XditdError as error:  # whichever it is, the fellow waits for an answer
            logger.warning("no peer copy, uploads are broadcast reason=%s", error.detail)
            return None
        return mapping

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
