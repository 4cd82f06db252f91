"""Get the tensors of a lent component onto a rank's device, as views of what is mapped or as one copy."""

from __future__ import annotations

from functools import partial

import torch

from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.file_watch import check_files_unchanged
from xditd.gpu_workers.models.matching import AnyMatch
from xditd.gpu_workers.models.own_buffer import OwnBuffer
from xditd.gpu_workers.packed.product_choice import ProductChoice
from xditd.gpu_workers.parallel.gpu_copies import GpuCopies
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.parallel.upload_partition import clip_ranges
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.tensors import CopiedBytes, Manifest, TensorSpec
from xditd.ipc.transports.tensor_views import VIEW_ALIGNMENT_BYTES, BlockViews


class TensorLoader:
    """Loads components on one rank. All ranks load the same ones in the same order."""

    def __init__(self, device: torch.device, gpu_copies: GpuCopies, products: ProductChoice) -> None:
        self._device = device
        self._gpu_copies = gpu_copies
        self._products = products

    def load(
        self, manifest: Manifest, match: AnyMatch, opened: list[OpenBlock | None], clock: Clock
    ) -> tuple[dict[str, torch.Tensor], Bindings, list[torch.Tensor], CopiedBytes]:
        """Get every tensor onto this rank's device, as a view or as one copy, and bind them to parameters.

        On GPUs each rank uploads a share of the host memory. All ranks then copy the same tensors (``apart``), at the
        same offsets: which ones depends on the kind of the block alone.
        """
        is_cuda = self._device.type == "cuda"
        received: dict[int, torch.Tensor] = {}
        with raise_on_all_ranks():
            for number, block in enumerate(manifest.blocks):
                if opened[number] is None:
                    received[number] = torch.empty(block.size_bytes, dtype=torch.uint8, device=self._device)
            sources = [received[number] if block is None else block.bytes for number, block in enumerate(opened)]
            read = match.read_names
            specs = [spec for spec in manifest.tensors if spec.name in read]
            apart = [spec for spec in specs if self._must_copy(spec, sources[spec.block])]
            own = OwnBuffer.allocate(apart, self._device)
            if own is None:
                check_files_unchanged(opened)
        tensors: dict[str, torch.Tensor] = {}
        copies: list[torch.Tensor] = []
        size = 0
        if own is not None:
            share = self._gpu_copies.fill(own.buffer, partial(own.fill, sources, opened), clock.mark)
            tensors, copies = own.tensors, [own.buffer]
            size = sum(each.nbytes for each in clip_ranges(own.ranges, share))
        with self._gpu_copies.copy_blocks(manifest.blocks, sources, received, clock.mark):
            views = [BlockViews(source) for source in sources]
            for spec in specs:
                if spec.name not in tensors:
                    tensors[spec.name] = views[spec.block].view(spec)
        made: list[torch.Tensor] = []
        if match.packed:
            with raise_on_all_ranks():
                made = match.convert(tensors, manifest.label)
            clock.mark("dequantise")
            match.choose_products(self._products, tensors)
            clock.mark("choose products")
        bindings = match.bind(tensors)  # after the copies, since it may convert tensors
        clock.mark("bind")
        made_bytes = sum(each.nbytes for each in made)
        if not is_cuda:
            return tensors, bindings, [*copies, *made], CopiedBytes(host_to_host=size + made_bytes)
        others = sum(spec.extent_bytes for spec in apart) - size
        peer = others + sum(buffer.numel() for buffer in received.values())
        copied = CopiedBytes(host_to_device=size, peer=peer, device_to_device=made_bytes)
        return tensors, bindings, [*copies, *received.values(), *made], copied

    def _must_copy(self, spec: TensorSpec, source: torch.Tensor) -> bool:
        if self._device.type == "cuda":
            return not source.is_cuda
        return spec.offset_bytes % VIEW_ALIGNMENT_BYTES != 0
