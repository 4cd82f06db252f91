"""Blocks that lie on one rank's GPU, brought onto the other ranks': one copy each, over NVLink or PCIe.

Two ranks whose GPUs reach each other's memory open the lender's handle where it is needed and copy from there; all
others broadcast. Which way it is, all ranks agree on. docs/decisions/0004 has the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from xditd.gpu_workers.agreement import agree
from xditd.gpu_workers.fused import exchange
from xditd.gpu_workers.layouts import ParallelLayout
from xditd.ipc.errors import StaleSource
from xditd.ipc.tensors import Block, CudaIpcBlock
from xditd.ipc.transports.cuda_ipc import CudaMapping
from xditd.ipc.transports.fingerprints import check_fingerprint

logger = logging.getLogger(__name__)


class PeerCopies:
    """What every rank but one needs of each lent block. Every rank makes the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, fellow_uuids: tuple[str, ...]) -> None:
        self._device = layout.device
        self._fellow_uuids = fellow_uuids
        self.is_direct = layout.device.type == "cuda" and layout.world_size == 2 and exchange.is_possible(2)
        """Whether ranks try to copy from the lender's memory; where that fails, they broadcast all the same."""

    def deliver(
        self,
        blocks: Sequence[Block],
        sources: Sequence[torch.Tensor],
        missing: Mapping[int, torch.Tensor],
        mark: Callable[[str], None],
    ) -> None:
        """Fill what is missing here, and give the others what is missing there; the bytes are there on return.

        ``mark`` ends a phase for the lend's timings: ``peer_open``, ``peer_copy`` (or a broadcast) and ``peer_close``.

        ``sources`` are this rank's bytes (1-D uint8) of each block: what is mapped from its own GPU, or the buffers
        that are to be filled, which are ``missing``, too, by number of block. Every rank has opened the blocks of its
        own GPU by then, so that what is stale or too short has been refused already.
        """
        wanted = {number: block for number, block in enumerate(blocks) if isinstance(block, CudaIpcBlock)}
        if not wanted:
            return
        if self.is_direct and self._copy(wanted, missing, mark):
            return
        for number, block in wanted.items():
            dist.broadcast(sources[number], src=self._fellow_uuids.index(block.device_uuid))
        torch.cuda.synchronize(self._device)  # "prepared" means that the bytes are here
        mark("peer_copy")

    def _copy(
        self, blocks: Mapping[int, CudaIpcBlock], missing: Mapping[int, torch.Tensor], mark: Callable[[str], None]
    ) -> bool:
        """Copy from the lender's memory; ``False``, on every rank, where one of them cannot."""
        mappings: dict[int, CudaMapping] = {}
        try:
            fault = self._open(blocks, missing, mappings)
            if fault:
                logger.warning("no peer copy, blocks are broadcast reason=%s", fault)
            if not agree(not fault):
                return False
            mark("peer_open")
            for number, mapping in mappings.items():
                mapping.copy_to(missing[number], 0, mapping.size_bytes)
            torch.cuda.synchronize(self._device)
            mark("peer_copy")
            return True
        finally:
            for mapping in mappings.values():
                mapping.close()
            mark("peer_close")

    def _open(
        self,
        blocks: Mapping[int, CudaIpcBlock],
        missing: Mapping[int, torch.Tensor],
        mappings: dict[int, CudaMapping],
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
                sample = block.fingerprint
                mapping.copy_to(target, sample.offset_bytes, sample.length_bytes)
                check_fingerprint(target, sample, f"GPU {block.device_uuid}, seen from another GPU")
        except StaleSource as error:
            return error.detail
        return ""
