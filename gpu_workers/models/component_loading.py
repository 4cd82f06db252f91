"""Get the tensors of a lent component onto a rank's device, as views of what is mapped or as one copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch

from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.file_watch import check_files_unchanged
from xditd.gpu_workers.models.lent_copies import LentCopies, find_shared, written_ranges
from xditd.gpu_workers.models.matching import LoadedMatch
from xditd.gpu_workers.models.own_buffer import OwnBuffer
from xditd.gpu_workers.packed.product_choice import ProductChoice
from xditd.gpu_workers.parallel.gpu_copies import GpuCopies
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.parallel.upload_partition import CopyRange, clip_ranges
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.tensors import CopiedBytes, Manifest, TensorSpec
from xditd.ipc.transports.tensor_views import VIEW_ALIGNMENT_BYTES, BlockViews


class Loaded(NamedTuple):
    """The tensors of a component on a rank's device: ``bindings`` of parameters, and what they are views of.

    ``made`` are weights that were dequantised or converted to another dtype.
    """

    tensors: dict[str, torch.Tensor]
    bindings: Bindings
    copies: LentCopies
    made: list[torch.Tensor]
    copied: CopiedBytes


class TensorLoader:
    """Loads components on one rank. All ranks load the same ones in the same order."""

    def __init__(self, device: torch.device, gpu_copies: GpuCopies, products: ProductChoice) -> None:
        self._device = device
        self._gpu_copies = gpu_copies
        self._products = products

    def load(
        self,
        manifest: Manifest,
        match: LoadedMatch,
        opened: list[OpenBlock | None],
        clock: Clock,
        kept: LentCopies | None = None,
        written: Collection[str] = (),
        others: Iterable[tuple[Manifest, LentCopies]] = (),
    ) -> Loaded:
        """Get every tensor onto this rank's device, as a view or as one copy, and bind them to parameters.

        On GPUs each rank uploads a share of the host memory. All ranks then copy the same tensors (``apart``), at the
        same offsets: which ones depends on the kind of the block alone. ``kept`` are copies of the same memory, which
        all ranks have or none has; of these only the ``written`` tensors are copied again. What one of the ``others``
        has copied from the same file is shared with it.
        """
        with raise_on_all_ranks():
            received = self._receiving_buffers(manifest, opened, kept)
            sources = [received[number] if block is None else block.bytes for number, block in enumerate(opened)]
            read = match.read_names
            specs = [spec for spec in manifest.tensors if spec.name in read]
            apart = [spec for spec in specs if self._must_copy(spec, sources[spec.block])]
            is_kept = kept is not None and kept.has_apart(apart)
            shared = kept.shared if kept is not None and is_kept else find_shared(manifest, apart, others)
            apart = [spec for spec in apart if spec.name not in shared]
            own = kept.apart if kept is not None and is_kept else OwnBuffer.allocate(apart, self._device)
            if own is None:
                check_files_unchanged(opened)
        tensors = dict(shared)
        size = peer = 0
        if own is not None:
            if is_kept:
                size = self._refill(own, own.ranges_of(apart, written), sources, opened, clock)
            else:
                share = self._gpu_copies.fill(own.buffer, partial(own.fill, sources, opened), clock.mark)
                size = sum(each.nbytes for each in clip_ranges(own.ranges, share))
                peer = sum(spec.extent_bytes for spec in apart) - size
            tensors |= own.tensors
        parts = None if kept is None else written_ranges(manifest.tensors, written)
        with self._gpu_copies.copy_blocks(manifest.blocks, sources, received, clock.mark, parts):
            views = [BlockViews(source) for source in sources]
            for spec in specs:
                if spec.name not in tensors:
                    tensors[spec.name] = views[spec.block].view(spec)
        made = self._convert(match, tensors, manifest.label, clock)
        bindings = match.bind(tensors)  # after the copies, since it may convert tensors
        clock.mark("bind")
        for number, buffer in received.items():
            peer += buffer.numel() if parts is None else sum(map(len, parts.get(number, [])))
        copied = self._count(size, peer, sum(each.nbytes for each in made))
        return Loaded(tensors, bindings, LentCopies(own, received, shared), made, copied)

    def _receiving_buffers(
        self, manifest: Manifest, opened: list[OpenBlock | None], kept: LentCopies | None
    ) -> dict[int, torch.Tensor]:
        """Return a buffer for each block that this rank does not open, but copies from another rank's GPU."""
        return {
            number: torch.empty(block.size_bytes, dtype=torch.uint8, device=self._device)
            if kept is None
            else kept.received[number]
            for number, block in enumerate(manifest.blocks)
            if opened[number] is None
        }

    def _count(self, from_host: int, from_peers: int, made: int) -> CopiedBytes:
        if self._device.type != "cuda":
            return CopiedBytes(host_to_host=from_host + made)
        return CopiedBytes(host_to_device=from_host, peer=from_peers, device_to_device=made)

    def _convert(
        self, match: LoadedMatch, tensors: dict[str, torch.Tensor], label: str, clock: Clock
    ) -> list[torch.Tensor]:
        """Dequantise and convert ``tensors`` as the match needs them; return the new tensors."""
        made: list[torch.Tensor] = []
        if match.needs_conversion:
            with raise_on_all_ranks():
                made = match.convert(tensors, label)
            clock.mark("convert")
        if match.packed:
            match.choose_products(self._products, tensors)
            clock.mark("choose products")
        return made

    def _refill(
        self,
        own: OwnBuffer,
        ranges: list[CopyRange],
        sources: list[torch.Tensor],
        opened: list[OpenBlock | None],
        clock: Clock,
    ) -> int:
        """Copy ranges of a buffer on every rank, and return their bytes."""
        whole = range(own.buffer.numel())
        with raise_on_all_ranks(), closing(own.fill(sources, opened, [whole], ranges)) as filled:
            deque(filled, maxlen=0)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # "prepared" means that the bytes are here
        clock.mark("copy")
        return sum(each.nbytes for each in ranges)

    def _must_copy(self, spec: TensorSpec, source: torch.Tensor) -> bool:
        if self._device.type == "cuda":
            return not source.is_cuda
        return spec.offset_bytes % VIEW_ALIGNMENT_BYTES != 0
