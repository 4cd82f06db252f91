"""The model cache: modules on the meta device, built once for each architecture, that run lent weights without a copy.

Plugging assigns lent tensors as a model's parameters; unplugging restores the meta parameters, so that the memory can
be unmapped. Another checkpoint of the same architecture, such as a fine-tune, reuses the module and compiled kernels.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.family import Family, HasSettings, Kind
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.mixed_precision import compute_in_widest
from xditd.gpu_workers.models.operations import BranchMemory
from xditd.gpu_workers.models.packed_weights import embedding_targets, linear_targets
from xditd.gpu_workers.models.pretrained import LoadDtypes
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.models.registry import detect, families, load_faults_note, operations_of, titles
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.gpu_workers.packed.embedding import pack_embeddings
from xditd.gpu_workers.packed.linear import PackedMemory, pack_linears
from xditd.gpu_workers.parallel import component_layouts
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc import limits
from xditd.ipc.errors import Internal, RequestError, UnknownFamily
from xditd.ipc.name_lists import listed
from xditd.ipc.recognition import form_error, unsupported_error
from xditd.ipc.status import FusedCheck
from xditd.ipc.tensor_names import by_prefix

logger = logging.getLogger(__name__)

Signature = tuple[Kind | None, torch.dtype | None, LoadDtypes | None, frozenset[tuple[str, TensorInfo]]]
Key = tuple[str, Hashable, torch.dtype, frozenset[tuple[str, torch.dtype]], torch.dtype, frozenset[tuple[str, str]]]


MAX_AHEAD: Final = 8
"""Models that were announced, but not lent so far, and stay. Each takes some MiB of the host."""


class ModelCache:
    """The models of this process, by family, configuration and dtypes. ``layout`` is the group's.

    Every rank makes the same calls in the same order, since a model may need new process groups.
    """

    def __init__(
        self, layout: ParallelLayout, memory: PackedMemory | None = None, resources: ProcessResources | None = None
    ) -> None:
        self.layout = layout
        self._resources = resources
        self.built = 0
        self.reused = 0
        self.dropped = 0
        self.packed = memory or PackedMemory(layout.device)
        self._models: dict[tuple[Key, int], CachedModel] = {}
        self._resolutions: dict[Signature, Resolution] = {}
        self._signatures: dict[Key, Signature] = {}
        self._is_ahead = False
        self._ahead: deque[tuple[Key, int]] = deque()
        self._layouts: dict[tuple[int, torch.dtype], ParallelLayout] = {}

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the fast path checks of all models since the last call."""
        found = [check for model in self._models.values() for check in model.take_checks()]
        return tuple(found[-limits.MAX_FUSED_CHECKS :])

    @property
    def paths(self) -> list[ForwardPaths]:
        """The paths of the forwards of all fast paths."""
        return [model.paths for model in self._models.values() if model.paths is not None]

    @property
    def lora_memory(self) -> list[BranchMemory]:
        """The copies of LoRAs' factors of all fast paths."""
        return [model.lora_memory for model in self._models.values() if model.lora_memory is not None]

    def release_idle(self, lent: Collection[int] = ()) -> None:
        """Free the reserved memory of all models without plugged weights; ``lent`` are the ids of models in use."""
        for model in self._models.values():
            model.release(is_lent=id(model) in lent)

    def match(
        self,
        tensors: Mapping[str, TensorInfo],
        kind: Kind | None = None,
        compute_dtype: torch.dtype | None = None,
        taken: Collection[int] = (),
        settings: Mapping[str, Any] | None = None,
        load_dtypes: LoadDtypes | None = None,
    ) -> CheckpointMatch:
        """Match a checkpoint: find its family, check every tensor, and build or reuse its model.

        With a ``kind``, tensors of other components in the same file are skipped. ``compute_dtype`` is that of packed
        weights, if the client gave one. A model is reused for weights in the same formats; a ControlNet gets none of
        those ``taken``, the ids of models of other components, since several run in each step. ``settings`` are those
        of a ``config.json`` or a live module, some of which no tensor shows. ``load_dtypes`` as
        ``resolution.resolve`` takes them.

        Raises:
            UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: see ``registry.detect``,
                ``resolution.resolve``, ``registry.operations_of``, ``component_layouts.choose``
                and ``Operations.fuse``.
        """
        signature = (kind, compute_dtype, load_dtypes, frozenset(tensors.items()))
        resolution = self._resolutions.get(signature)
        if resolution is None:
            resolution = self._resolutions[signature] = _resolve(tensors, kind, compute_dtype, load_dtypes)
            self._log_skipped(resolution)
        if settings is not None and isinstance(resolution.family, HasSettings):
            resolution = replace(resolution, config=resolution.family.with_settings(resolution.config, settings))
        key = _key(resolution)
        self._signatures[key] = signature
        number = 0
        while resolution.family.kind == "controlnet" and id(self._models.get((key, number))) in taken:
            number += 1
        is_reused = (key, number) in self._models
        return CheckpointMatch(
            model=self._find_or_build((key, number), resolution),
            family=resolution.family,
            config=resolution.config,
            dtype=resolution.dtype,
            key_map=resolution.key_map,
            sources=resolution.sources,
            is_reused=is_reused,
            packed=resolution.packed,
            dtypes=resolution.dtypes,
            converted=resolution.converted,
        )

    def _log_skipped(self, resolution: Resolution) -> None:
        if resolution.skipped and self.layout.rank == 0:
            logger.info(
                "tensors skipped, no job reads them: family=%s count=%d names=%s",
                resolution.family.name, len(resolution.skipped), listed(resolution.skipped),
            )  # fmt: skip

    def _find_or_build(self, key: tuple[Key, int], resolution: Resolution) -> CachedModel:
        """Return the model of this key, and count whether it was built or reused."""
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = self._build(resolution)
            self.built += 1
            if self._is_ahead:
                self._ahead.append(key)
        elif not self._is_ahead:
            self.reused += 1
        if not self._is_ahead and key in self._ahead:
            self._ahead.remove(key)
        return model

    @contextmanager
    def building_ahead(self) -> Iterator[None]:
        """Keep at most :data:`MAX_AHEAD` of the models that are built within and are not lent afterwards."""
        self._is_ahead = True
        try:
            yield
        finally:
            self._is_ahead = False
        while len(self._ahead) > MAX_AHEAD:
            key, number = self._ahead.popleft()
            del self._models[key, number]
            self.dropped += 1
            signature = self._signatures.pop(key, None)
            if signature is not None:
                self._resolutions.pop(signature, None)

    def _choose_layout(self, family: Family[Any], config: Hashable, dtype: torch.dtype) -> ParallelLayout:
        """Choose the layout once for each number of heads and dtype, since all ranks have to take part in the choice.

        A model is no such key: one rank alone may lack it, because its GPU was full.
        """
        key = (family.heads(config), dtype)
        found = self._layouts.get(key)
        if found is None:
            found = self._layouts[key] = component_layouts.choose(self.layout, family.name, key[0], dtype)
        return found

    def _build(self, resolution: Resolution) -> CachedModel:
        family, config, dtype = resolution.family, resolution.config, resolution.dtype
        operations = operations_of(family)
        layout = self._choose_layout(family, config, dtype)
        # Weight initialisation takes two thirds of the time to build a module, on the meta device too.
        from diffusers.models.modeling_utils import no_init_weights

        with torch.device("meta"), no_init_weights():
            module = operations.build(config).eval().requires_grad_(False)
        # nn.Module's own `to`: diffusers' warns of modules to keep in float32, which do not apply.
        torch.nn.Module.to(module, dtype)
        for submodule in module.modules():
            for name, buffer in submodule._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    submodule._buffers[name] = buffer.to(self.layout.device)
        unfilled = [name for name, buffer in module.named_buffers() if buffer.is_meta]
        if unfilled:
            raise Internal(f"{family.name}: buffers without values after building: {listed(unfilled)}", names=unfilled)
        exceptions = _exceptions(resolution)
        entries = family.entries(config, resolution.sources)
        check_targets(family, entries, {name: tuple(p.shape) for name, p in module.named_parameters()})
        packed = linear_targets(module, resolution.key_map, resolution.packed)
        # As plain weights of a text encoder, packed ones are widened whatever they are dequantised into.
        shown = torch.float32 if family.kind == "text_encoder" else None
        dtypes = {target: resolution.dtypes[resolution.key_map[target].source] for target in packed}
        layers = pack_linears(module, dtypes, self.packed, shown)
        tables = {}
        if family.kind == "text_encoder":  # its operations look rows up, and do nothing else with a table
            targets = embedding_targets(module, resolution.key_map, resolution.packed)
            tables = pack_embeddings(module, targets, resolution.compute_dtype, self.layout.device, shown)
        of_packed = {target.removesuffix(".weight") for target in layers}  # these cast their own biases
        apart = {target: each for target, each in exceptions.items() if target.rpartition(".")[0] not in of_packed}
        compute_in_widest(module, apart, self.layout.device)
        return CachedModel(
            family, operations, config, dtype, layout, module, apart, {**layers, **tables}, self.packed, self._resources
        )


def _resolve(
    tensors: Mapping[str, TensorInfo],
    kind: Kind | None,
    compute_dtype: torch.dtype | None,
    load_dtypes: LoadDtypes | None,
) -> Resolution:
    """Match a checkpoint to its family; in a file with several components, that of the ``kind``.

    If no family claims it, the error names the model, if known. If the claiming family refuses it, the error is that
    family's, unless the file is in a form that no family takes (an adapter, packed weights).
    """
    try:
        family = detect(tensors.keys(), kind)
    except UnknownFamily as error:
        known = unsupported_error(_as_plain(tensors), titles())
        if known is None:
            raise
        raise type(known)(known.detail + load_faults_note(), names=known.names) from error
    others = [] if kind is None else [each for each in families() if each is not family]
    try:
        return resolve(family, tensors, others, compute_dtype, load_dtypes)
    except RequestError as error:
        known = form_error(_without_others(_as_plain(tensors), others), titles())
        if known is None:
            raise
        raise known from error


def _as_plain(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return packed weights as plain ones: an error names what cannot be run, and packed weights can."""
    return {name: info if info.packed is None else TensorInfo("bfloat16", info.shape) for name, info in tensors.items()}


def _without_others(tensors: Mapping[str, TensorInfo], others: Collection[Family[Any]]) -> dict[str, TensorInfo]:
    """Return the tensors without those that other families claim under their own prefixes."""
    groups = by_prefix(tensors)
    kept = [group for group in groups.values() if not any(other.claims(group) for other in others)]
    return {name: tensors[name] for group in kept for spelled in group.values() for name in spelled}


def _key(resolution: Resolution) -> Key:
    """Return what models are kept by: checkpoints with the same key share a model."""
    return (
        resolution.family.name,
        resolution.config,
        resolution.dtype,
        frozenset(_exceptions(resolution).items()),
        resolution.compute_dtype,
        resolution.formats,
    )


def _exceptions(resolution: Resolution) -> Mapping[str, torch.dtype]:
    """Return the parameters of another dtype than the main one; none for text encoders, which compute in float32."""
    return {} if resolution.family.kind == "text_encoder" else resolution.exceptions
