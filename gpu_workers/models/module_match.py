"""A manifest matched to a module that runs as its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.packed_weights import choose_products, dequantise_once, packed_view
from xditd.gpu_workers.models.scale_checks import check_scales
from xditd.gpu_workers.packed.product_choice import Decision, ProductChoice
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.facts import ComponentFacts, ModuleFacts
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComponentKind, Manifest
from xditd.ipc.transports.tensor_views import dtype_name


@dataclass(frozen=True)
class _ClassAsFamily:
    """Stands for the ``Family`` of a module that has none: what the workers read of every component's."""

    name: str
    kind: str = "module"

    def heads(self, _: object) -> int:
        """Return 0: no attention heads are distributed, and every rank runs the whole module."""
        return 0


@dataclass(frozen=True)
class ModuleMatch:
    """A manifest matched to a module; see :class:`~xditd.gpu_workers.models.checkpoint_match.CheckpointMatch`.

    ``dtype`` is that in which the module is loaded, or of most elements of a live one. ``sources`` has the name in the
    manifest of each tensor of the module.
    """

    model: ClassModel
    dtype: torch.dtype
    sources: Mapping[str, str]
    is_reused: bool
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of the tensors whose dtype ``from_pretrained`` changes."""
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    """The packed weights, by their names in the manifest."""
    config: None = None
    """A module has no configuration of a family."""
    products: dict[str, Decision] = field(default_factory=dict)
    """How packed weights are multiplied, once :meth:`choose_products` has chosen; by their names in the manifest."""
    family_reason: str = ""
    """Why no family runs it; empty if none was asked."""
    _converted: dict[str, torch.Tensor] = field(default_factory=dict)
    """The memory of these tensors, once :meth:`reserve` has allocated it."""

    @property
    def family(self) -> _ClassAsFamily:
        return _ClassAsFamily(self.model.class_name)

    @property
    def needs_conversion(self) -> bool:
        """Whether :meth:`convert` has something to do: plain tensors are converted by :meth:`bind`."""
        return bool(self.packed)

    @property
    def read_names(self) -> set[str]:
        """The names in the manifest of all tensors that it uses, companions of packed weights included."""
        return {*self.sources.values(), *(name for each in self.packed.values() for name in each.names)}

    def choose_products(self, choice: ProductChoice, tensors: Mapping[str, torch.Tensor]) -> None:
        """Choose how packed weights are multiplied. All ranks call it together."""
        if self.model.plan is not None:
            sources = {self.sources[name]: name for name in self.model.packed_layers}
            packed = {source: PackedTensor.of(self.packed[source], tensors) for source in sources}
            dtypes = {source: self.model.plan.dtypes[name] for source, name in sources.items()}
            self.products.update(choose_products(choice, dtypes, packed))

    def convert(self, tensors: dict[str, torch.Tensor], label: str) -> list[torch.Tensor]:
        """Check the scales of packed weights, and dequantise those that no packed layer multiplies, in ``tensors``.

        Returns the dequantised tensors. Errors begin with the ``label``.

        Raises:
            BadCheckpoint: a scale is not finite.
            torch.OutOfMemoryError: the device has too little memory.
        """
        if self.model.plan is None:
            return []
        check_scales(self.packed.values(), tensors, label)
        kept = {self.sources[name] for name in self.model.packed_layers}
        dtypes = {source: self.model.plan.dtypes[name] for name, source in self.sources.items()}
        once = [each for source, each in self.packed.items() if source not in kept]
        return dequantise_once(once, tensors, dtypes)

    def reserve(self) -> int:
        """Allocate the memory of tensors in another dtype, so that :meth:`bind` cannot fail; return its bytes."""
        plan = self.model.plan
        if plan is not None:
            for name, shape in self.shapes.items():
                self._converted[name] = torch.empty(shape, dtype=plan.dtypes[name], device=self.model.device)
        return self.model.reserve() + sum(each.nbytes for each in self._converted.values())

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return the module's tensors by name: views of ``tensors``, and converted copies."""
        found: Bindings = {}
        for name, source in self.sources.items():
            found[name] = self._packed_view(source, tensors) if name in self.model.packed_layers else tensors[source]
        for name, converted in self._converted.items():
            found[name] = converted.copy_(tensors[self.sources[name]])
        return found

    def _packed_view(self, name: str, tensors: Mapping[str, torch.Tensor]) -> PackedTensor:
        return packed_view(self.packed[name], tensors, self.products.get(name))

    def by_canonical_name(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return the tensors by their own names: a class has no others."""
        return dict(tensors)

    def facts(self, manifest: Manifest) -> ComponentFacts:
        """Return the facts that clients get of a component."""
        return ComponentFacts(
            family=self.model.class_name,
            class_name=self.model.class_name,
            kind=ComponentKind.MODULE,
            dtype=dtype_name(self.dtype),
            bytes_by_dtype=manifest.bytes_by_dtype,
            bytes_by_format=manifest.bytes_by_format,
            scratch_bytes=self.model.scratch_bytes,
            module=ModuleFacts(
                methods=self.model.methods(),
                family_reason=self.family_reason,
                layout="rows" if isinstance(self.model.planned, str) else "tokens",
                layout_reason=self.model.planned if isinstance(self.model.planned, str) else "",
            ),
        )
