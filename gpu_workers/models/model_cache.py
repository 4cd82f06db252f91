"""The model cache: modules on the meta device, built once for each architecture, that run lent weights without a copy.

Plugging assigns lent tensors as a model's parameters; unplugging restores the meta parameters, so that the memory can
be unmapped. Another checkpoint of the same architecture, such as a fine-tune, reuses the module and compiled kernels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from xditd.gpu_workers.models.entries import Bindings, Slice, TensorInfo
from xditd.gpu_workers.models.family import Family, Kind
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.mixed_precision import compute_in_widest
from xditd.gpu_workers.models.operations import (
    Operations,
    TextEncoderOperations,
    TransformerOperations,
    VaeOperations,
)
from xditd.gpu_workers.models.packed_weights import bytes_by_format, check_scales, dequantise_once, linear_targets
from xditd.gpu_workers.models.registry import detect, families, load_faults_note, operations_of, titles
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.gpu_workers.packed.linear import PackedLinear, PackedProductCounts, pack_linears
from xditd.gpu_workers.packed.scratch import ScratchBuffer
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.parallel import component_layouts
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc import limits
from xditd.ipc.errors import Internal, RequestError, UnknownFamily
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.field_types import DType
from xditd.ipc.name_lists import listed
from xditd.ipc.packed import PackedWeight
from xditd.ipc.recognition import form_error, unsupported_error
from xditd.ipc.status import FusedCheck
from xditd.ipc.tensor_names import by_prefix
from xditd.ipc.tensors import ComponentKind, Manifest
from xditd.ipc.transports.tensor_views import dtype_name

logger = logging.getLogger(__name__)


Signature = tuple[Kind | None, torch.dtype | None, frozenset[tuple[str, TensorInfo]]]
Key = tuple[str, Hashable, torch.dtype, frozenset[tuple[str, torch.dtype]], torch.dtype, frozenset[tuple[str, str]]]


class CachedModel:
    """One model. ``owner`` is the component id of the plugged weights, or ``None``.

    ``layout`` is the group's, with the degrees that its heads allow and an attention backend for its dtype.
    ``packed_layers`` are the layers that multiply packed weights, by the names of these.
    """

    def __init__(
        self,
        family: Family[Any],
        operations: Operations[Any],
        config: Hashable,
        dtype: torch.dtype,
        layout: ParallelLayout,
        module: torch.nn.Module,
        exceptions: Mapping[str, torch.dtype],
        packed_layers: Mapping[str, PackedLinear],
        scratch: ScratchBuffer,
    ) -> None:
        self.family = family
        self.config = config
        self.dtype = dtype
        self.layout = layout
        self.device = layout.device
        self.module = module
        self.owner: str | None = None
        self.operations = operations
        self.packed_layers = packed_layers
        self.scratch_bytes = max((layer.scratch_bytes for layer in packed_layers.values()), default=0)
        self._scratch = scratch
        self._fast = operations.fuse(config, module, layout, dtype, exceptions)
        # The dictionary and key of each parameter.
        self._slots: dict[str, tuple[dict[str, torch.nn.Parameter | None], str]] = {}
        self._empty: dict[str, torch.nn.Parameter] = {}
        for path, submodule in module.named_modules():
            for name, parameter in submodule._parameters.items():
                if parameter is not None:
                    target = f"{path}.{name}" if path else name
                    self._slots[target] = (submodule._parameters, name)
                    self._empty[target] = parameter

    @overload
    def operations_for(self, kind: Literal["transformer"]) -> TransformerOperations[Any]: ...
    @overload
    def operations_for(self, kind: Literal["vae"]) -> VaeOperations[Any]: ...
    @overload
    def operations_for(self, kind: Literal["text_encoder"]) -> TextEncoderOperations[Any]: ...
    def operations_for(self, kind: Kind) -> Any:
        """Return the family's operations, typed by kind; ``registry.operations_of`` has checked them."""
        assert self.family.kind == kind, f"{self.family.name} is a {self.family.kind}, not a {kind}"
        return self.operations

    @property
    def attention_backend(self) -> str:
        """xDiT's name of the attention backend of its plain modules."""
        return self.layout.attention_backend

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the fast path checks since the last call."""
        return () if self._fast is None else self._fast.take_checks()

    @property
    def paths(self) -> ForwardPaths | None:
        """The paths of the forwards of the fast path, if there is one."""
        return None if self._fast is None else self._fast.paths

    def reserve(self) -> int:
        """Allocate the memory that a plug needs besides the lent tensors, so that it cannot fail; return its bytes."""
        if self.packed_layers:
            self._scratch.reserve(self, self.scratch_bytes)
        return 0 if self._fast is None else self._fast.reserve()

    def release(self) -> None:
        """Free the reserved memory if nothing is plugged."""
        if self.owner is None:
            self._scratch.release(self)
            if self._fast is not None:
                self._fast.unplug()

    def plug(
        self,
        bindings: Bindings,
        owner: str = "",
        checkpoint: Mapping[str, torch.Tensor | PackedTensor] | None = None,
    ) -> None:
        """Assign ``bindings`` as the parameters, and hold them until :meth:`unplug` or the next plug.

        ``checkpoint`` are the same tensors by canonical name, for the fast path, which is idle without them.
        ``load_state_dict(assign=True)`` takes ten times as long.
        """
        if bindings.keys() != self._slots.keys() | self.packed_layers.keys():
            differing = sorted(bindings.keys() ^ (self._slots.keys() | self.packed_layers.keys()))
            raise Internal(f"bindings do not match the {self.family.name} model: {listed(differing)}", names=differing)
        for target, (parameters, name) in self._slots.items():
            bound = bindings[target]
            assert isinstance(bound, torch.Tensor)
            parameters[name] = torch.nn.Parameter(bound, requires_grad=False)
        if self.packed_layers:
            self._scratch.reserve(self, self.scratch_bytes)  # again: it was freed with the last component
        for target, layer in self.packed_layers.items():
            packed = bindings[target]
            assert isinstance(packed, PackedTensor)
            layer.plug(packed)
        if self._fast is not None:
            self._fast.plug(checkpoint or {})
            self._fast.paths.use_weights(owner, bindings)
        self.owner = owner

    def unplug(self) -> None:
        """Restore the meta parameters; the model then holds no reference to lent memory."""
        for target, (parameters, name) in self._slots.items():
            parameters[name] = self._empty[target]
        for layer in self.packed_layers.values():
            layer.unplug()
        if self._fast is not None:
            self._fast.unplug()
        self.owner = None


@dataclass(frozen=True, slots=True)
class CheckpointMatch:
    """A checkpoint matched to a family and a model: which tensors are which parameters."""

    model: CachedModel
    family: Family[Any]
    config: Hashable
    dtype: torch.dtype
    key_map: Mapping[str, Slice]
    sources: Mapping[str, str]
    is_reused: bool
    packed: Mapping[str, PackedWeight]
    compute_dtype: torch.dtype

    @property
    def read_names(self) -> set[str]:
        """The names in the manifest of all tensors that it uses, companions of packed weights included."""
        return {*self.sources.values(), *(name for each in self.packed.values() for name in each.names)}

    def convert(self, tensors: dict[str, torch.Tensor], label: str) -> list[torch.Tensor]:
        """Check the scales of packed weights, and dequantise those that no packed layer multiplies, in ``tensors``.

        Returns the dequantised tensors. Errors begin with the ``label``.

        Raises:
            BadCheckpoint: a scale is not finite.
            torch.OutOfMemoryError: the device has too little memory.
        """
        check_scales(self.packed.values(), tensors, label)
        kept = {self.key_map[target].source for target in self.model.packed_layers}
        once = [each for name, each in self.packed.items() if name not in kept]
        return dequantise_once(once, tensors, self.compute_dtype)

    def reserve(self) -> int:
        """Allocate the memory that a plug needs besides the lent tensors, so that it cannot fail; return its bytes."""
        return self.model.reserve()

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return each parameter as a view of ``tensors``, without a copy. The views keep the memory mapped."""
        bindings: Bindings = {}
        for target, part in self.key_map.items():
            if target in self.model.packed_layers:
                packed = PackedTensor.of(self.packed[part.source], tensors)
                if part.stop - part.start != packed.shape[0]:
                    packed = packed.rows(part.start, part.stop)
                bindings[target] = packed if len(packed.shape) == 2 else packed.as_matrix()
                continue
            tensor = tensors[part.source]
            if part.stop - part.start != tensor.shape[0]:
                tensor = tensor[part.start : part.stop]
            bindings[target] = tensor if part.shape is None else tensor.view(part.shape)
        return bindings

    def by_canonical_name(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return the tensors that the family uses, by canonical name; packed ones where layers multiply them so."""
        kept = {self.key_map[target].source for target in self.model.packed_layers}
        return {
            canonical: PackedTensor.of(self.packed[given], tensors) if given in kept else tensors[given]
            for canonical, given in self.sources.items()
        }

    def facts(self, manifest: Manifest) -> ComponentFacts:
        """Return the facts that clients get of a component."""
        model, kind = self.model, self.family.kind
        transformer = vae = text_encoder = None
        if kind == "transformer":
            transformer = model.operations_for(kind).facts(self.config, model.layout)
        elif kind == "vae":
            vae = model.operations_for(kind).facts(self.config)
        else:
            text_encoder = model.operations_for(kind).facts(self.config)
        sizes: Counter[DType] = Counter()
        for spec in manifest.tensors:
            sizes[spec.dtype] += spec.extent_bytes
        return ComponentFacts(
            family=self.family.name,
            class_name=class_of(model.module),
            kind=ComponentKind(kind),
            dtype=dtype_name(self.dtype),
            bytes_by_dtype=dict(sizes),
            bytes_by_format=bytes_by_format(manifest),
            scratch_bytes=model.scratch_bytes,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
        )


class ModelCache:
    """The models of this process, by family, configuration and dtypes. ``layout`` is the group's.

    Every rank makes the same calls in the same order, since a model may need new process groups.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self.layout = layout
        self.built = 0
        self.reused = 0
        self.scratch = ScratchBuffer(layout.device)
        self.packed_products = PackedProductCounts()
        self._models: dict[Key, CachedModel] = {}
        self._resolutions: dict[Signature, Resolution] = {}
        self._layouts: dict[tuple[int, torch.dtype], ParallelLayout] = {}

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the fast path checks of all models since the last call."""
        found = [check for model in self._models.values() for check in model.take_checks()]
        return tuple(found[-limits.MAX_FUSED_CHECKS :])

    @property
    def paths(self) -> list[ForwardPaths]:
        """The paths of the forwards of all fast paths."""
        return [model.paths for model in self._models.values() if model.paths is not None]

    def release_idle(self) -> None:
        """Free the reserved memory of all models without plugged weights."""
        for model in self._models.values():
            model.release()

    def match(
        self,
        tensors: Mapping[str, TensorInfo],
        kind: Kind | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> CheckpointMatch:
        """Match a checkpoint: find its family, check every tensor, and build or reuse its model.

        With a ``kind``, tensors of other components in the same file are skipped. ``compute_dtype`` is that of packed
        weights, if the client gave one. A model is reused for weights in the same formats.

        Raises:
            UnknownFamily, BadCheckpoint, UnsupportedDtype, Unsupported: see ``registry.detect``,
                ``resolution.resolve``, ``registry.operations_of``, ``component_layouts.choose``
                and ``Operations.fuse``.
        """
        signature = (kind, compute_dtype, frozenset(tensors.items()))
        resolution = self._resolutions.get(signature)
        if resolution is None:
            resolution = _resolve(tensors, kind, compute_dtype)
            self._resolutions[signature] = resolution
            if resolution.skipped and self.layout.rank == 0:
                logger.info(
                    "tensors skipped, no job reads them: family=%s count=%d names=%s",
                    resolution.family.name, len(resolution.skipped), listed(resolution.skipped),
                )  # fmt: skip
        exceptions = frozenset(_exceptions(resolution).items())
        formats = resolution.formats
        key = (
            resolution.family.name,
            resolution.config,
            resolution.dtype,
            exceptions,
            resolution.compute_dtype,
            formats,
        )
        model = self._models.get(key)
        is_reused = model is not None
        if model is None:
            model = self._build(resolution)
            self._models[key] = model
            self.built += 1
        else:
            self.reused += 1
        return CheckpointMatch(
            model=model,
            family=resolution.family,
            config=resolution.config,
            dtype=resolution.dtype,
            key_map=resolution.key_map,
            sources=resolution.sources,
            is_reused=is_reused,
            packed=resolution.packed,
            compute_dtype=resolution.compute_dtype,
        )

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
        layers = pack_linears(module, packed, resolution.compute_dtype, self.scratch, self.packed_products)
        of_packed = {target.removesuffix(".weight") for target in layers}  # these cast their own biases
        apart = {target: each for target, each in exceptions.items() if target.rpartition(".")[0] not in of_packed}
        compute_in_widest(module, apart, self.layout.device)
        return CachedModel(family, operations, config, dtype, layout, module, apart, layers, self.scratch)


def _resolve(tensors: Mapping[str, TensorInfo], kind: Kind | None, compute_dtype: torch.dtype | None) -> Resolution:
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
        return resolve(family, tensors, others, compute_dtype)
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


def _exceptions(resolution: Resolution) -> Mapping[str, torch.dtype]:
    """Return the parameters of another dtype than the main one; none for text encoders, which compute in float32."""
    return {} if resolution.family.kind == "text_encoder" else resolution.exceptions


def class_of(module: object) -> str:
    """Return the name of a module's class, or of its base class, in diffusers or transformers."""
    for kind in type(module).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in ("diffusers", "transformers"):
            return kind.__name__
    return type(module).__name__
