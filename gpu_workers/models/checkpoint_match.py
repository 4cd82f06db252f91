"""A checkpoint matched to a family and a model: which tensors are which parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.entries import Bindings, Slice
from xditd.gpu_workers.models.family import Family
from xditd.gpu_workers.models.packed_weights import (
    choose_products,
    dequantise_once,
    packed_view,
)
from xditd.gpu_workers.models.scale_checks import check_scales
from xditd.gpu_workers.packed.product_choice import Decision, ProductChoice
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.facts import ComponentFacts, TransformerFacts
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComponentKind, Manifest
from xditd.ipc.transports.tensor_views import dtype_name


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
    dtypes: Mapping[str, torch.dtype]
    """The dtype that each tensor is computed with, by its name in the manifest; packed weights dequantised."""
    converted: frozenset[str] = frozenset()
    """The names of plain tensors that have another dtype in the manifest."""
    products: dict[str, Decision] = field(default_factory=dict)
    """How packed weights are multiplied, once :meth:`choose_products` has chosen; by their names in the manifest."""
    made: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    """The tensors of a live module that no checkpoint holds, as its class makes them: the family has its own."""

    @property
    def needs_conversion(self) -> bool:
        """Whether :meth:`convert` has something to do."""
        return bool(self.packed or self.converted)

    @property
    def kept_packed(self) -> set[str]:
        """The names in the manifest of weights that layers use packed."""
        return {self.key_map[target].source for target in self.model.packed_layers}

    def choose_products(self, choice: ProductChoice, tensors: Mapping[str, torch.Tensor]) -> None:
        """Choose how packed weights are multiplied. All ranks call it together.

        Text encoders compute in float32, and multiply dequantised weights, as in ComfyUI.
        """
        if self.family.kind == "text_encoder":
            why = Decision("reference", "text encoders compute in float32")
            self.products.update(dict.fromkeys(self._kept_in_order(), why))
        else:
            packed = {name: PackedTensor.of(self.packed[name], tensors) for name in self._kept_in_order()}
            self.products.update(choose_products(choice, self.dtypes, packed))

    def _kept_in_order(self) -> list[str]:
        kept = self.kept_packed
        return [name for name in self.packed if name in kept]

    @property
    def read_names(self) -> set[str]:
        """The names in the manifest of all tensors that it uses, companions of packed weights included."""
        return {*self.sources.values(), *(name for each in self.packed.values() for name in each.names)}

    def convert(self, tensors: dict[str, torch.Tensor], label: str) -> list[torch.Tensor]:
        """Give the ``tensors`` the dtypes that they are computed with.

        This checks the scales of packed weights, dequantises those that no packed layer uses, and converts plain
        tensors to the dtypes in which a class loads them. Returns the new tensors. Errors begin with the ``label``.

        Raises:
            BadCheckpoint: a scale is not finite.
            torch.OutOfMemoryError: the device has too little memory.
        """
        check_scales(self.packed.values(), tensors, label)
        kept = self.kept_packed
        once = [each for name, each in self.packed.items() if name not in kept]
        made = dequantise_once(once, tensors, self.dtypes)
        for name in self.converted:
            tensors[name] = tensors[name].to(self.dtypes[name])
            made.append(tensors[name])
        return made

    def reserve(self) -> int:
        """Allocate the memory that a plug needs besides the lent tensors, so that it cannot fail; return its bytes."""
        return self.model.reserve()

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return each parameter as a view of ``tensors``, without a copy. The views keep the memory mapped."""
        bindings: Bindings = {}
        for target, part in self.key_map.items():
            if target in self.model.packed_layers:
                packed = self._packed_view(part.source, tensors)
                if part.stop - part.start != packed.shape[0]:
                    packed = packed.rows(part.start, part.stop)
                bindings[target] = packed if len(packed.shape) == 2 else packed.as_matrix()
                continue
            tensor = tensors[part.source]
            if part.stop - part.start != tensor.shape[0]:
                tensor = tensor[part.start : part.stop]
            bindings[target] = tensor if part.shape is None else tensor.view(part.shape)
        return bindings

    def _packed_view(self, name: str, tensors: Mapping[str, torch.Tensor]) -> PackedTensor:
        return packed_view(self.packed[name], tensors, self.products.get(name))

    def by_canonical_name(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return the tensors that the family uses, by canonical name; packed ones where layers multiply them so."""
        kept = self.kept_packed
        return {
            canonical: self._packed_view(given, tensors) if given in kept else tensors[given]
            for canonical, given in self.sources.items()
        }

    def facts(self, manifest: Manifest) -> ComponentFacts:
        """Return the facts that clients get of a component."""
        model, kind = self.model, self.family.kind
        read = self.read_names  # of a file with several components, those of this one
        used = msgspec.structs.replace(
            manifest,
            tensors=tuple(spec for spec in manifest.tensors if spec.name in read),
            packed=tuple(self.packed.values()),
        )
        transformer = vae = text_encoder = controlnet = None
        if kind == "transformer":
            transformer = self._transformer_facts()
        elif kind == "vae":
            vae = model.operations_for(kind).facts(self.config)
        elif kind == "controlnet":
            controlnet = model.operations_for(kind).facts(self.config, model.layout)
        else:
            text_encoder = model.operations_for(kind).facts(self.config)
        return ComponentFacts(
            family=self.family.name,
            class_name=class_of(model.module),
            kind=ComponentKind(kind),
            dtype=dtype_name(self.dtype),
            bytes_by_dtype=used.bytes_by_dtype,
            bytes_by_format=used.bytes_by_format,
            scratch_bytes=model.scratch_bytes,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            controlnet=controlnet,
        )

    def _transformer_facts(self) -> TransformerFacts:
        operations = self.model.operations_for("transformer")
        facts = operations.facts(self.config, self.model.layout)
        in_float32 = [
            variant
            for variant in facts.variants
            if operations.recipe.noise_dtype(torch.bfloat16, variant) == torch.float32
        ]
        return msgspec.structs.replace(facts, float32_latents=tuple(in_float32))


def class_of(module: object) -> str:
    """Return the name of a module's class, or of its base class, in diffusers or transformers."""
    for kind in type(module).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in ("diffusers", "transformers"):
            return kind.__name__
    return type(module).__name__
