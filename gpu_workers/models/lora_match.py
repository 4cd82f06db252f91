"""A manifest matched as a LoRA: its factors, and which families have its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from xditd.gpu_workers.models.entries import TORCH_DTYPES, Bindings, dtype_of_most
from xditd.gpu_workers.models.lora_binding import FEWEST, LentLora
from xditd.gpu_workers.models.lora_targets import count_by_family, text_encoders_of
from xditd.gpu_workers.models.registry import titles
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import ComponentFacts, LoraFacts
from xditd.ipc.loras import LoraDescription, LoraLayer
from xditd.ipc.name_lists import listed
from xditd.ipc.packed import PackedWeight
from xditd.ipc.recognition import one_of
from xditd.ipc.tensors import ComponentKind, Manifest
from xditd.ipc.transports.tensor_views import dtype_name


@dataclass(frozen=True)
class _LoraAsFamily:
    """What the workers read of every component's ``Family``, for a LoRA, which is of no family alone."""

    name: str
    kind: str = "lora"

    def heads(self, _: object) -> int:
        """A LoRA is not run: every rank has the whole of it."""
        return 0


@dataclass(frozen=True)
class LoraMatch:
    """A manifest matched as a LoRA; see :class:`~xditd.gpu_workers.models.checkpoint_match.CheckpointMatch`."""

    model: LentLora
    lora_facts: LoraFacts
    dtype: torch.dtype
    read_names: frozenset[str]
    is_reused: bool = False
    config: None = None
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    needs_conversion: bool = False

    @property
    def family(self) -> _LoraAsFamily:
        return _LoraAsFamily(next(iter(self.lora_facts.families), "class"))

    def choose_products(self, *_: object) -> None:
        """Choose nothing: factors are not packed."""

    def convert(self, *_: object) -> list[torch.Tensor]:
        """Convert nothing: factors are converted when a job first needs them in another dtype."""
        return []

    def reserve(self) -> int:
        return 0

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return the factors by name, as views of ``tensors``."""
        return dict(tensors)

    def by_canonical_name(self, _: object) -> Bindings:
        return {}

    def facts(self, manifest: Manifest) -> ComponentFacts:
        """Return the facts that clients get of a component."""
        return ComponentFacts(
            family=self.family.name,
            class_name="LoRA",
            kind=ComponentKind.LORA,
            dtype=dtype_name(self.dtype),
            bytes_by_dtype=manifest.bytes_by_dtype,
            lora=self.lora_facts,
        )


def match_lora(manifest: Manifest, description: LoraDescription) -> LoraMatch:
    """Match a manifest, whose faults have been checked, as a LoRA.

    Raises:
        Unsupported: no registered family has most of its layers.
        BadRequest: it is also described as a module, or as packed.
    """
    if manifest.module is not None or manifest.packed:
        raise BadRequest("a LoRA has no class and no packed weights: lend its factors in float32, bfloat16 or float16")
    families: dict[str, int] = {}
    unknown: list[LoraLayer] = []
    if not description.as_class:  # the layers of a class are known when a job names it
        families, unknown = count_by_family(description.layers)
        _check_known(description, families, len(unknown))
    specs = {spec.name: spec for spec in manifest.tensors}
    facts = LoraFacts(
        families=families,
        text_encoders=() if description.as_class else text_encoders_of(description.layers),
        layers=len(description.layers),
        largest_rank=max(specs[layer.down].shape[0] for layer in description.layers),
        unknown=tuple(layer.down for layer in unknown[: limits.MAX_LORA_NAMES]),
        unknown_count=len(unknown),
    )
    dtype = dtype_of_most([(TORCH_DTYPES[spec.dtype], spec.shape) for spec in manifest.tensors])
    return LoraMatch(LentLora(manifest.label, description), facts, dtype, frozenset(specs))


def _check_known(description: LoraDescription, families: Mapping[str, int], unknown: int) -> None:
    layers = description.layers
    in_model = sum(layer.part == "model" for layer in layers)
    most = max(families.values(), default=0)
    if most and most >= FEWEST * in_model and len(layers) - unknown >= FEWEST * len(layers):
        return
    names = [layer.down for layer in layers]
    raise Unsupported(
        f"a LoRA of another model: of its {len(layers)} layers, {most} have names of a family that takes LoRAs; lend "
        f"one of {one_of(titles())}, lend it with as_class=True for a module that runs as its class, or merge it into "
        f"its model and lend that; its layers: {listed(names)}",
        names=names,
    )
