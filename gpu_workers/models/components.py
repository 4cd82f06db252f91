"""The lent components of one rank: prepare, plug, find, copy and unmap them."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import torch

from xditd.gpu_workers.kernels.cache_folder import cache_folder
from xditd.gpu_workers.models import model_warm_up
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.class_models import ClassModels
from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.component_assembly import ComponentAssembly
from xditd.gpu_workers.models.component_loading import TensorLoader
from xditd.gpu_workers.models.file_watch import FileWatch, stale_file_error
from xditd.gpu_workers.models.lent_copies import LentCopies
from xditd.gpu_workers.models.lora_binding import LentLora
from xditd.gpu_workers.models.lora_variants import LoraCounters, LoraVariant, prepare_variant, strengths_of
from xditd.gpu_workers.models.matching import LoadedMatch, match_manifest, outline_of_class
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.own_buffer import OwnBuffer
from xditd.gpu_workers.models.tokenizer_building import TokenizerCache
from xditd.gpu_workers.packed.linear import PackedMemory
from xditd.gpu_workers.packed.product_choice import ProductChoice
from xditd.gpu_workers.parallel.gpu_copies import GpuCopies
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, share_value
from xditd.gpu_workers.weights.blocks import OpenBlock, OpenBlocks
from xditd.ipc.errors import (
    BadRequest,
    Internal,
    OtherRankFailed,
    UnknownComponent,
)
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.status import LoraCounts
from xditd.ipc.tensors import (
    ComponentKind,
    CopiedBytes,
    FileDigest,
    Manifest,
)

_NOTHING = torch.empty(0, dtype=torch.uint8)


class Components:
    """The components of this rank. Every rank makes the same calls in the same order."""

    def __init__(self, layout: ParallelLayout, device_uuid: str, peer_uuids: tuple[str, ...]) -> None:
        self.packed = PackedMemory(layout.device)
        products = ProductChoice(
            layout.native_products,
            layout.device,
            cache_folder("products"),
            exchange=share_value,
            is_leader=layout.rank == 0,
        )
        self.class_models = ClassModels(layout, self.packed)
        self.models = ModelCache(layout, self.packed, self.class_models.resources)
        self.blocks = OpenBlocks(layout.device, device_uuid)
        self.gpu_copies = GpuCopies(layout, peer_uuids)
        self.loras = LoraCounters()
        self.files = FileWatch(layout)
        self.plugs = 0
        self._assembly = ComponentAssembly(
            device=layout.device,
            peer_uuids=peer_uuids,
            blocks=self.blocks,
            files=self.files,
            models=self.models,
            class_models=self.class_models,
            loader=TensorLoader(layout.device, self.gpu_copies, products),
            tokenizers=TokenizerCache() if layout.rank == 0 else None,
        )
        self._device = layout.device
        self._kept: dict[str, LentCopies] = {}
        self._prepared: dict[str, Component] = {}
        self._plugged: dict[str, Component] = {}

    def __len__(self) -> int:
        return len(self._plugged)

    def prepare(
        self,
        component_id: str,
        manifest: Manifest,
        exporter: ProcessIdentity,
        digests: Sequence[FileDigest] = (),
        changed: Collection[str] | None = None,
    ) -> Component:
        """Do all parts of a lend that may fail: check, map, verify, copy where needed, bind.

        ``digests`` are those that :meth:`FileWatch.take_digests` returned in an earlier group. Other components are not
        changed; :meth:`plug` follows when every rank is prepared. All ranks fail together. ``changed`` are the tensors
        that were written since an :meth:`unmap` that has kept the copies of this component.

        Raises:
            UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: the tensors do not fit.
            ForeignGpu, ProcessGone, StaleSource, NotPermitted, OutOfMemory: the bytes cannot be read.
            OtherRankFailed: another rank failed.
        """
        opened: list[OpenBlock | None] = []
        kept = self._kept.pop(component_id, None)
        if changed is None:
            kept = None
        try:
            known = {found.block: found.digest for found in digests}
            others = (*self._prepared.values(), *self._plugged.values())
            component = self._assembly.assemble(
                component_id, manifest, exporter, opened, known, kept, changed or (), others
            )
        except BaseException as error:
            # The traceback's frames hold views of the blocks, and a block with views cannot be unmapped.
            traceback.clear_frames(error.__traceback__)
            stale = stale_file_error(opened) if isinstance(error, OtherRankFailed) else None
            for block in opened:
                if block is not None:
                    self.blocks.release(block)
            self._release_idle()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # else torch keeps the memory of an unfinished copy, maybe gigabytes
            if stale is not None:
                raise stale from error
            raise
        self._prepared[component_id] = component
        return component

    def build_ahead(self, outline: Outline) -> bool:
        """Build the model that the :meth:`prepare` of a component will find; return whether it can be warmed up.

        All ranks fail together.

        Raises:
            UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported, BadRequest: as :meth:`prepare`.
        """
        match, _ = self._match_ahead(outline)
        return isinstance(match, CheckpointMatch) and model_warm_up.can_warm_up(match)

    def warm_up(self, outline: Outline) -> None:
        """Warm up a model that was built ahead, unless it is lent or has had weights. All ranks fail together.

        Raises:
            UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported, BadRequest: as :meth:`prepare`.
            OutOfMemory: a GPU has no room for the weights of the warm-up.
        """
        match, tensors = self._match_ahead(outline)
        is_lent = id(match.model) in self._lent_models()
        if isinstance(match, CheckpointMatch) and model_warm_up.is_due(match, tensors, is_lent=is_lent):
            model_warm_up.warm_up(match, tensors, match.model.warm_up_sizes)

    def _match_ahead(self, outline: Outline) -> tuple[LoadedMatch, Sequence[OutlinedTensor]]:
        """Return the match of an outline, and its tensors: those that its class makes, if it has none."""
        with raise_on_all_ranks():
            if not outline.tensors:
                outline = outline_of_class(outline)
            with self.models.building_ahead():
                return match_manifest(outline, self.models, self.class_models), outline.tensors

    def plug(self, component_id: str) -> Component:
        """Assign a prepared component's tensors as its model's parameters, in place of an older one of the same id."""
        component = self._prepared.pop(component_id, None)
        if component is None:
            raise Internal(f"component {component_id} was not prepared")
        clock = Clock(component.timings_ms)
        older = self._plugged.pop(component_id, None)
        self._plugged[component_id] = component
        self._plug(component)
        clock.mark("plug")
        if older is not None:
            self._free(older)
        self.files.add_plugged(component_id, component.manifest, component.opened)
        return component

    def get(self, component_id: str, kind: str) -> Component:
        """Return a component, with its weights plugged into its model.

        Raises:
            UnknownComponent: nothing is lent under this id.
            BadRequest: it is of another kind.
            StaleSource: its file has changed.
        """
        component = self.find(component_id, kind)
        self.check_unchanged(component)
        if not component.is_loaded:
            self._plug(component)
        return component

    def find(self, component_id: str, kind: str) -> Component:
        """Return a component of which a job reads the configuration alone, as :meth:`get`, but without its weights.

        Raises:
            UnknownComponent, BadRequest: as :meth:`get`.
        """
        component = self._plugged.get(component_id)
        if component is None:
            raise UnknownComponent(f"component {component_id}: not lent to this worker; lend it again")
        if component.match.family.kind != kind:
            raise BadRequest(f"component {component_id} is a {component.match.family.kind}; this job needs a {kind}")
        return component

    def get_lora(self, component_id: str) -> LentLora:
        """Return a lent LoRA.

        Raises:
            UnknownComponent, BadRequest, StaleSource: as :meth:`get`.
        """
        return self.get(component_id, "lora").lora

    def variant(self, component: Component, uses: Sequence[LoraUse]) -> LoraVariant:
        """Bind the LoRAs of a job to its component, whose weights do not change.

        Raises:
            UnknownComponent, BadRequest, Unsupported, StaleSource: see ``prepare_variant``.
        """
        return prepare_variant(component.runnable, uses, self.get_lora, self.loras)

    def titles_of(self, uses: Sequence[LoraUse]) -> list[str]:
        """Return the LoRAs of a job with their strengths, for messages."""
        return [
            f"LoRA {self._plugged[use.component_id].manifest.label} at strength {strengths_of(use)}" for use in uses
        ]

    def lora_counts(self) -> LoraCounts:
        """Return what jobs did with LoRAs."""
        return self.loras.report([*self.models.lora_memory, *self.class_models.lora_memory])

    @property
    def weights_bytes(self) -> int:
        """The bytes of this rank's own memory that hold weights: copies, and what was made of lent ones."""
        own = [tensor for kept in self._kept.values() for tensor in kept.buffers]
        filled = {}
        for component in (*self._prepared.values(), *self._plugged.values()):
            own += [*component.copies, *component.lent_copies.shared.values()]
            if component.is_loaded:
                filled[id(component.match.model)] = component.filled_bytes
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in own}
        return sum(storages.values()) + sum(filled.values())

    @property
    def models_dropped(self) -> int:
        """How many models the caches have dropped so far. Modules and their graphs are in reference cycles."""
        return self.models.dropped + self.class_models.dropped

    def has_module(self, component_id: str) -> bool:
        """Return whether a component runs as its own class, with no family."""
        component = self._plugged.get(component_id)
        return component is not None and component.facts.kind is ComponentKind.MODULE

    def check_unchanged(self, component: Component, loras: Sequence[LoraUse] = ()) -> None:
        """Check that the weights are still those that were lent. Call before a job, and before its results are used.

        ``loras`` are those of the job, whose factors are checked, too.

        Raises:
            StaleSource: on rank 0: a mapped file was rewritten, truncated or grown.
        """
        self.files.check(component.opened)
        for use in loras:
            self.files.check(self._plugged[use.component_id].opened)

    def check_all_unchanged(self, component_ids: Iterable[str]) -> None:
        """Check the weights of other components of a job, as :meth:`check_unchanged` does."""
        for component_id in dict.fromkeys(component_ids):
            self.check_unchanged(self._plugged[component_id])

    def copy_component(self, component_id: str) -> tuple[CopiedBytes, dict[str, float]]:
        """Copy the mapped tensors of a component into this rank's own memory, and unmap them. All ranks fail together.

        Returns the bytes that were copied, and the milliseconds by phase.

        Raises:
            UnknownComponent: nothing is lent under this id.
            StaleSource: its file has changed.
            OutOfMemory: there is no memory for the copy; nothing changes.
            OtherRankFailed: another rank failed.
        """
        clock = Clock()
        with raise_on_all_ranks():
            component = self._plugged.get(component_id)
            if component is None:
                raise UnknownComponent(f"component {component_id}: not lent to this worker; lend it again")
            sources = [_NOTHING if block is None else block.bytes for block in component.opened]
            specs = [
                spec
                for spec in component.manifest.tensors
                if spec.name in component.tensors and _shares_storage(component.tensors[spec.name], sources[spec.block])
            ]
            self.check_unchanged(component)
            own = OwnBuffer.allocate(specs, self._device)
            if own is not None:
                no_files = [None] * len(sources)  # copy from the mappings
                deque(own.fill(sources, no_files, [range(own.buffer.numel())]), maxlen=0)
            self.check_unchanged(component)
        clock.mark("copy")
        is_loaded = component.is_loaded
        size = 0
        if own is not None:
            component.tensors.update(own.tensors)
            component.copies.append(own.buffer)
            size = sum(each.nbytes for each in own.ranges)
        mapped, component.bindings = component.bindings, component.match.bind(component.tensors)
        component.checkpoint = component.match.by_canonical_name(component.tensors)
        if is_loaded:
            self._plug(component)
        mapped.clear()  # whoever knows them by this map
        sources.clear()  # a block with views cannot be unmapped
        self._release(component)
        clock.mark("unmap")
        is_cuda = self._device.type == "cuda"
        return CopiedBytes(device_to_device=size) if is_cuda else CopiedBytes(host_to_host=size), clock.marks_ms

    def unmap(self, component_id: str, *, keeps_copies: bool = False) -> None:
        """Remove a component, prepared or plugged. An unknown id is no error: every rank can get the same undo.

        With ``keeps_copies`` this rank's own copies of lent bytes stay until the next :meth:`prepare` or :meth:`unmap`
        of this component.
        """
        self._kept.pop(component_id, None)
        for where in (self._prepared, self._plugged):
            component = where.pop(component_id, None)
            if component is not None:
                if component.is_loaded:
                    component.match.model.unplug()
                if keeps_copies:
                    self._kept[component_id] = component.lent_copies
                self._free(component)
                self._release_idle()
                others = (*self._prepared.values(), *self._plugged.values())
                if all(each.match.model is not component.match.model for each in others):
                    component.match.model.release()  # the caches may have dropped it
        if not self._plugged and not self._prepared and self._device.type == "cuda":
            torch.cuda.empty_cache()  # the working memory of jobs, gigabytes after a VAE

    def close(self) -> None:
        """Forget every component."""
        for component_id in [*self._prepared, *self._plugged, *self._kept]:
            self.unmap(component_id)

    def _release_idle(self) -> None:
        """Free the reserved memory of all models without plugged weights, but not what lent ones need for a plug."""
        lent = self._lent_models()
        self.models.release_idle(lent)
        self.class_models.release_idle(lent)

    def _lent_models(self) -> set[int]:
        """Return the ids of the models of all components, prepared or plugged."""
        return {id(each.match.model) for each in (*self._prepared.values(), *self._plugged.values())}

    def _plug(self, component: Component) -> None:
        component.match.model.plug(component.bindings, component.component_id, component.checkpoint)
        self.plugs += 1

    def _free(self, component: Component) -> None:
        component.bindings.clear()
        component.checkpoint.clear()
        component.tensors.clear()
        component.lent_copies = LentCopies()
        if component.copies and self._device.type == "cuda":
            component.copies.clear()
            torch.cuda.empty_cache()  # else torch keeps the memory from other programs
        component.copies.clear()
        self._release(component)

    def _release(self, component: Component) -> None:
        self.files.forget(component.component_id)
        for block in component.opened:
            if block is not None:
                self.blocks.release(block)
        component.opened.clear()


def _shares_storage(tensor: torch.Tensor, source: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
