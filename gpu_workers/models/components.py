"""Lent components on one rank: mapped, verified, bound to a model, and let go of again.

| block | on its own GPU | on another rank's GPU | on the CPU |
|---|---|---|---|
| ``cuda_ipc`` | mapped | one peer copy | refused |
| ``host_shm``, ``file`` | a share of one upload | the same | mapped; slices that start off 64 bytes copied |

What other ranks upload of host memory comes from their GPUs by a peer copy; small components every rank uploads whole.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.file_watch import FileWatch, check_opened, fault_of
from xditd.gpu_workers.models.model_cache import CheckpointMatch, ModelCache
from xditd.gpu_workers.parallel.gpu_copies import GpuCopies
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.parallel.upload_partition import CopyRange, cut, join
from xditd.gpu_workers.weights.blocks import OpenBlock, OpenBlocks
from xditd.ipc.errors import (
    BadRequest,
    ForeignGpu,
    Internal,
    OtherRankFailed,
    RequestError,
    UnknownComponent,
    named,
)
from xditd.ipc.facts import ComponentFacts, TransformerFacts, VaeFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import Block, CopiedBytes, CudaIpcBlock, FileDigest, Manifest, TensorSpec
from xditd.ipc.transports.file import FileMapping
from xditd.ipc.transports.tensor_views import VIEW_ALIGNMENT_BYTES, BlockViews, place
from xditd.ipc.transports.uploads import FileStretch, can_upload, upload

_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass
class Component:
    """One lent component. ``bindings`` are views of ``opened`` blocks or of ``copies``, which this rank owns."""

    component_id: str
    match: CheckpointMatch
    bindings: dict[str, torch.Tensor]
    manifest: Manifest
    facts: ComponentFacts
    tensors: dict[str, torch.Tensor]
    """The lent tensors that jobs read, by name, as views like the bindings."""
    opened: list[OpenBlock | None]
    copies: list[torch.Tensor]
    copied: CopiedBytes
    timings_ms: dict[str, float]

    @property
    def transformer_facts(self) -> TransformerFacts:
        """Those of a component that was got as a transformer."""
        assert self.facts.transformer is not None
        return self.facts.transformer

    @property
    def vae_facts(self) -> VaeFacts:
        """Those of a component that was got as a VAE."""
        assert self.facts.vae is not None
        return self.facts.vae

    @property
    def is_loaded(self) -> bool:
        return self.match.model.owner == self.component_id


class _Own(NamedTuple):
    """Tensors in a buffer of this rank, and what of the lent blocks belongs where in it."""

    tensors: dict[str, torch.Tensor]
    buffer: torch.Tensor
    ranges: list[CopyRange]


class Components:
    """The components of this rank. Every rank makes the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, device_uuid: str, peer_uuids: tuple[str, ...]) -> None:
        self.models = ModelCache(layout)
        self.blocks = OpenBlocks(layout.device, device_uuid)
        self.gpu_copies = GpuCopies(layout, peer_uuids)
        self.files = FileWatch(layout)
        self.plugs = 0
        self._device = layout.device
        self._rank = layout.rank
        self._peer_uuids = peer_uuids
        self._prepared: dict[str, Component] = {}
        self._live: dict[str, Component] = {}

    def __len__(self) -> int:
        return len(self._live)

    def prepare(
        self,
        component_id: str,
        manifest: Manifest,
        exporter: ProcessIdentity,
        digests: Sequence[FileDigest] = (),
    ) -> Component:
        """Do everything about a lend that may fail: check, map, verify, copy where it must be, bind.

        ``digests`` are those that :meth:`FileWatch.take_digests` returned in an earlier group. Nothing that runs is
        touched; :meth:`plug` follows once every rank is prepared. All ranks fail together.

        Raises:
            UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: the tensors do not fit.
            ForeignGpu, ProcessGone, StaleSource, NotPermitted, OutOfMemory: the bytes cannot be had.
            OtherRankFailed: this rank could, another could not.
        """
        opened: list[OpenBlock | None] = []
        try:
            known = {found.block: found.digest for found in digests}
            component = self._assemble(component_id, manifest, exporter, opened, known)
        except BaseException as error:
            # The frames that failed still hold views of the blocks, and a block with views cannot be unmapped.
            traceback.clear_frames(error.__traceback__)
            stale = fault_of(opened) if isinstance(error, OtherRankFailed) else None
            for block in opened:
                if block is not None:
                    self.blocks.release(block)
            self.models.release_idle()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # a copy that was begun: torch would keep it, gigabytes that others may need
            if stale is not None:
                raise stale from error
            raise
        self._prepared[component_id] = component
        return component

    def plug(self, component_id: str) -> Component:
        """Put a prepared component to work; it replaces an older generation under the same id."""
        component = self._prepared.pop(component_id, None)
        if component is None:
            raise Internal(f"component {component_id} was not prepared")
        clock = Clock(component.timings_ms)
        older = self._live.pop(component_id, None)
        self._live[component_id] = component
        self._plug(component)
        clock.mark("plug")
        if older is not None:
            self._let_go(older)
        self.files.note_plugged(component_id, component.manifest, component.opened)
        return component

    def get(self, component_id: str, kind: str) -> Component:
        """Find a component and make sure that its weights are the ones plugged in.

        Raises:
            UnknownComponent: nothing is lent under this id.
            BadRequest: it is of another kind.
            StaleSource: its file has changed.
        """
        component = self._live.get(component_id)
        if component is None:
            raise UnknownComponent(f"component {component_id}: not lent to this worker; lend it again")
        if component.match.family.kind != kind:
            raise BadRequest(f"component {component_id} is a {component.match.family.kind}; this job needs a {kind}")
        self.check_unchanged(component)
        if not component.is_loaded:
            self._plug(component)
        return component

    def check_unchanged(self, component: Component) -> None:
        """Check that what the ranks compute with is what was lent. Call before a job, and before its results are used.

        Raises:
            StaleSource: on rank 0: a file whose own pages are the weights was rewritten, truncated or grown.
        """
        self.files.check(component.opened)

    def keep(self, component_id: str) -> tuple[CopiedBytes, dict[str, float]]:
        """Copy what is mapped of a component into memory of this rank's own, and unmap it. All ranks fail together.

        Returns what was copied, and the milliseconds by phase.

        Raises:
            UnknownComponent: nothing is lent under this id.
            StaleSource: its file has changed.
            OutOfMemory: no room for the copy; everything stays as it was.
            OtherRankFailed: this rank could, another could not.
        """
        clock = Clock()
        with raise_on_all_ranks():
            component = self._live.get(component_id)
            if component is None:
                raise UnknownComponent(f"component {component_id}: not lent to this worker; lend it again")
            sources = [_NOTHING if block is None else block.bytes for block in component.opened]
            specs = [
                spec
                for spec in component.manifest.tensors
                if spec.name in component.tensors and _shares_storage(component.tensors[spec.name], sources[spec.block])
            ]
            self.check_unchanged(component)
            own = self._lay_out(specs)
            if own is not None:
                nowhere = [None] * len(sources)  # in no file: what is mapped is copied
                deque(self._copy(own, sources, nowhere, [range(own.buffer.numel())]), maxlen=0)
            self.check_unchanged(component)
        clock.mark("copy")
        is_loaded = component.is_loaded
        size = 0
        if own is not None:
            component.tensors.update(own.tensors)
            component.copies.append(own.buffer)
            size = sum(each.nbytes for each in own.ranges)
        component.bindings = component.match.bind(component.tensors)
        if is_loaded:
            self._plug(component)
        sources.clear()  # a block with views cannot be unmapped
        self._release(component)
        clock.mark("unmap")
        is_cuda = self._device.type == "cuda"
        return CopiedBytes(device_to_device=size) if is_cuda else CopiedBytes(host_to_host=size), clock.marks_ms

    def unmap(self, component_id: str) -> None:
        """Forget a component, prepared or plugged; unknown is no error, so that an undo can be sent to every rank."""
        for where in (self._prepared, self._live):
            component = where.pop(component_id, None)
            if component is not None:
                if component.is_loaded:
                    component.match.model.unplug()
                self._let_go(component)
                self.models.release_idle()
        if not self._live and not self._prepared and self._device.type == "cuda":
            torch.cuda.empty_cache()  # what jobs worked in, gigabytes after a VAE: there are none until a new loan

    def close(self) -> None:
        """Forget every component."""
        for component_id in [*self._prepared, *self._live]:
            self.unmap(component_id)

    def _plug(self, component: Component) -> None:
        match = component.match
        match.model.plug(component.bindings, component.component_id, match.by_canonical_name(component.tensors))
        self.plugs += 1

    def _let_go(self, component: Component) -> None:
        component.bindings.clear()
        component.tensors.clear()
        if component.copies and self._device.type == "cuda":
            component.copies.clear()
            torch.cuda.empty_cache()  # torch would keep gigabytes that other programs on this GPU may be waiting for
        component.copies.clear()
        self._release(component)

    def _release(self, component: Component) -> None:
        self.files.forget(component.component_id)
        for block in component.opened:
            if block is not None:
                self.blocks.release(block)
        component.opened.clear()

    def _assemble(
        self,
        component_id: str,
        manifest: Manifest,
        exporter: ProcessIdentity,
        opened: list[OpenBlock | None],
        digests: Mapping[int, bytes],
    ) -> Component:
        clock = Clock()
        with raise_on_all_ranks():
            if faults := manifest.faults():
                raise BadRequest(f"manifest of {manifest.label}: {listed(faults, joint='; ')}", names=faults)
            match = self._match(manifest)
            reserved = match.model.reserve()
            clock.mark("match")
            for number, block in enumerate(manifest.blocks):
                opened.append(self._open(block, exporter, digests.get(number)))
            clock.mark("map")
        self.files.begin(opened)  # the rest of the lend goes on meanwhile
        tensors, bindings, copies, copied = self._gather(manifest, match, opened, clock)
        self.files.await_small(opened)
        # What plugging makes of the weights is a copy too, if a smaller one.
        facts, copied = match.facts(manifest), copied + CopiedBytes(device_to_device=reserved)
        return Component(
            component_id, match, bindings, manifest, facts, tensors, opened, copies, copied, clock.marks_ms
        )

    def _match(self, manifest: Manifest) -> CheckpointMatch:
        try:
            tensors = {spec.name: TensorInfo(spec.dtype, spec.shape) for spec in manifest.tensors}
            match = self.models.match(tensors, None if manifest.kind is None else manifest.kind.value)
        except RequestError as error:
            raise named(manifest.label, error) from error
        return match

    def _open(self, block: Block, exporter: ProcessIdentity, digest: bytes | None) -> OpenBlock | None:
        """Map a block, or leave it to be received from the rank on whose GPU it lies."""
        if isinstance(block, CudaIpcBlock) and block.device_uuid not in self._peer_uuids:
            known = listed(uuid for uuid in self._peer_uuids if uuid) or "none, they run on the CPU"
            raise ForeignGpu(f"device memory on GPU {block.device_uuid}: the workers' GPUs are {known}")
        return self.blocks.acquire(block, exporter, digest) if self.blocks.is_local(block) else None

    def _gather(
        self, manifest: Manifest, match: CheckpointMatch, opened: list[OpenBlock | None], clock: Clock
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor], CopiedBytes]:
        """Get every tensor onto this rank's device: as a view where it can be one, else as one copy; and bind them.

        Of bytes of the host that several GPUs need, each rank uploads its share. Every rank lists the same tensors as
        ``apart`` then, and lays them out in the same way: on a GPU it is the tier that says which are copied.
        """
        is_cuda = self._device.type == "cuda"
        received: dict[int, torch.Tensor] = {}
        with raise_on_all_ranks():
            for number, block in enumerate(manifest.blocks):
                if opened[number] is None:
                    received[number] = torch.empty(block.size_bytes, dtype=torch.uint8, device=self._device)
            sources = [received[number] if block is None else block.bytes for number, block in enumerate(opened)]
            read = set(match.sources.values())
            specs = [spec for spec in manifest.tensors if spec.name in read]
            apart = [spec for spec in specs if self._must_copy(spec, sources[spec.block])]
            own = self._lay_out(apart)
            if own is None:
                check_opened(opened)
        tensors: dict[str, torch.Tensor] = {}
        copies: list[torch.Tensor] = []
        size = 0
        if own is not None:
            share = self.gpu_copies.fill(own.buffer, partial(self._copy, own, sources, opened), clock.mark)
            tensors, copies = own.tensors, [own.buffer]
            size = sum(each.nbytes for each in cut(own.ranges, share))
        with self.gpu_copies.delivering(manifest.blocks, sources, received, clock.mark):
            views = [BlockViews(source) for source in sources]
            for spec in specs:
                if spec.name not in tensors:
                    tensors[spec.name] = views[spec.block].view(spec)
            bindings = match.bind(tensors)
        clock.mark("bind")
        if not is_cuda:
            return tensors, bindings, copies, CopiedBytes(host_to_host=size)
        others = sum(spec.extent_bytes for spec in apart) - size
        copied = CopiedBytes(host_to_device=size, peer=others + sum(buffer.numel() for buffer in received.values()))
        return tensors, bindings, [*copies, *received.values()], copied

    def _must_copy(self, spec: TensorSpec, source: torch.Tensor) -> bool:
        if self._device.type == "cuda":
            return not source.is_cuda
        return spec.offset_bytes % VIEW_ALIGNMENT_BYTES != 0

    def _lay_out(self, specs: list[TensorSpec]) -> _Own | None:
        """Get a buffer of this rank for these tensors, each aligned; ``None`` is for none."""
        if not specs:
            return None
        specs = sorted(specs, key=lambda spec: (spec.block, spec.offset_bytes))
        offsets, total = place([spec.extent_bytes for spec in specs])
        buffer = torch.empty(total, dtype=torch.uint8, device=self._device)
        views = BlockViews(buffer)
        tensors = {spec.name: views.view(spec, offset) for spec, offset in zip(specs, offsets, strict=True)}
        return _Own(tensors, buffer, join(specs, offsets))

    def _copy(
        self, own: _Own, sources: list[torch.Tensor], opened: Sequence[OpenBlock | None], parts: Sequence[range]
    ) -> Generator[None, None, None]:
        """Copy what of each part of a buffer comes from these sources, and yield after it, in stream order.

        Files among ``opened`` are read, not looked at; at the end they are checked for changes.
        """
        uploads: list[tuple[torch.Tensor | FileStretch, torch.Tensor]] = []
        counts = []
        for part in parts:
            before = len(uploads)
            for number, start, to, size in cut(own.ranges, part):
                source, target = sources[number].narrow(0, start, size), own.buffer.narrow(0, to, size)
                block = opened[number]
                if target.is_cuda and block is not None and isinstance(block.mapping, FileMapping):
                    uploads.append((block.mapping.stretch(start, size), target))
                elif can_upload(source, target):
                    uploads.append((source, target))
                else:
                    target.copy_(source)
            counts.append(len(uploads) - before)
        with closing(upload(uploads)) as uploaded:
            for count in counts:
                deque(islice(uploaded, count), maxlen=0)
                yield
        check_opened(opened)  # nothing reads them any more


def _shares_storage(tensor: torch.Tensor, source: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
