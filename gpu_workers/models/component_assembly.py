"""Make the component of a lent manifest on one rank: match, map, verify, copy where needed, and bind.

| block | on its own GPU | on another rank's GPU | on the CPU |
|---|---|---|---|
| ``cuda_ipc`` | mapped | one peer copy | refused |
| ``host_shm``, ``file`` | a share of one upload | the same | mapped; unaligned slices (64 bytes) are copied |

Each rank uploads a share of host memory and gets the others' shares by peer copy. It uploads small components whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch

from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.class_models import ClassModels
from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.component_loading import TensorLoader
from xditd.gpu_workers.models.file_watch import FileWatch
from xditd.gpu_workers.models.lent_copies import LentCopies
from xditd.gpu_workers.models.made_tensors import check_made_tensors
from xditd.gpu_workers.models.matching import match_manifest
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.tokenizer_building import TokenizerCache
from xditd.gpu_workers.models.tokenizer_component import make_tokenizer
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.weights.blocks import OpenBlock, OpenBlocks
from xditd.ipc.errors import BadRequest, ForeignGpu
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import Block, ComponentKind, CopiedBytes, CudaIpcBlock, Manifest


class ComponentAssembly:
    """Assembles components on one rank. All ranks assemble the same ones in the same order."""

    def __init__(
        self,
        *,
        device: torch.device,
        peer_uuids: tuple[str, ...],
        blocks: OpenBlocks,
        files: FileWatch,
        models: ModelCache,
        class_models: ClassModels,
        loader: TensorLoader,
        tokenizers: TokenizerCache | None,
    ) -> None:
        """Only rank 0, which builds tokenizers, has a cache of them."""
        self._device = device
        self._peer_uuids = peer_uuids
        self._blocks = blocks
        self._files = files
        self._models = models
        self._class_models = class_models
        self._loader = loader
        self._tokenizers = tokenizers

    def assemble(
        self,
        component_id: str,
        manifest: Manifest,
        exporter: ProcessIdentity,
        opened: list[OpenBlock | None],
        digests: Mapping[int, bytes],
        kept: LentCopies | None,
        changed: Collection[str],
        others: Collection[Component],
    ) -> Component:
        """Check, map, verify, copy where needed, and bind. All ranks fail together.

        Blocks that were mapped are appended to ``opened``, in the manifest's order with ``None`` for those that another
        rank maps, so that the caller can release them after an error. ``digests`` are those of blocks by number,
        ``kept`` and ``changed`` as :meth:`TensorLoader.load` takes them. What one of the ``others``, the components of
        this rank, has copied from the same file is shared with it. The component's tensors are views of its blocks and
        copies, valid until these are released.

        Raises:
            BadRequest, UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: the tensors do not fit.
            ForeignGpu, ProcessGone, StaleSource, NotPermitted, OutOfMemory: the bytes cannot be read.
            OtherRankFailed: another rank failed.
        """
        clock = Clock()
        with raise_on_all_ranks():
            if faults := manifest.faults():
                raise BadRequest(
                    f"manifest of {manifest.label}: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}", names=faults
                )
            if manifest.kind is ComponentKind.TOKENIZER:
                opened.extend(self._open(block, exporter, None) for block in manifest.blocks)
                made = make_tokenizer(component_id, manifest, opened, clock, self._tokenizers)
                while opened:  # what is built holds no lent memory
                    self._blocks.release(cast(OpenBlock, opened.pop()))
                return made
            taken = {id(each.match.model) for each in others if each.component_id != component_id}
            match = match_manifest(manifest, self._models, self._class_models, taken)
            reserved = match.reserve()
            clock.mark("match")
            for number, block in enumerate(manifest.blocks):
                opened.append(self._open(block, exporter, digests.get(number)))
            if isinstance(match, CheckpointMatch):
                check_made_tensors(match, manifest, opened)
            clock.mark("map")
        self._files.begin_digests(opened)  # in the background
        # Not with modules that run as their class, which may write to their tensors.
        shareable = [
            (each.manifest, each.lent_copies)
            for each in others
            if isinstance(match, CheckpointMatch) and isinstance(each.match, CheckpointMatch)
        ]
        loaded = self._loader.load(manifest, match, opened, clock, kept, changed, shareable)
        self._files.wait_for_small_digests(opened)
        # The memory that a plug fills (fp8 weights) counts as copied, too.
        filled = (
            CopiedBytes(device_to_device=reserved)
            if self._device.type == "cuda"
            else CopiedBytes(host_to_host=reserved)
        )
        return Component(
            component_id,
            match,
            loaded.bindings,
            manifest,
            match.facts(manifest),
            loaded.tensors,
            match.by_canonical_name(loaded.tensors),
            opened,
            loaded.copies,
            [*loaded.copies.buffers, *loaded.made],
            loaded.copied + filled,
            clock.marks_ms,
            reserved,
        )

    def _open(self, block: Block, exporter: ProcessIdentity, digest: bytes | None) -> OpenBlock | None:
        """Map a block; return ``None`` if another rank maps it and sends its bytes."""
        if isinstance(block, CudaIpcBlock) and block.device_uuid not in self._peer_uuids:
            known = listed(uuid for uuid in self._peer_uuids if uuid) or "none, they run on the CPU"
            raise ForeignGpu(f"device memory on GPU {block.device_uuid}: the workers' GPUs are {known}")
        return self._blocks.acquire(block, exporter, digest) if self._blocks.is_local(block) else None
