"""Which layers of a model the names in a LoRA mean, by the key map of its family.

A LoRA names a layer as some checkpoint does, or as the class does. The rows of a checkpoint's layer are those of one
or several layers of the class, so the rows of ``up`` are theirs, too. Names are compared with ``_`` for dots, since
kohya's scripts write them so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from xditd.gpu_workers.models.entries import Entry
from xditd.gpu_workers.models.family import Family
from xditd.gpu_workers.models.registry import families
from xditd.ipc.loras import LoraLayer, LoraPart

_WEIGHT = ".weight"
_NUMBER = re.compile(r"\d+")

ConfigT = TypeVar("ConfigT", bound=Hashable)


class TakesLoras(Protocol[ConfigT]):
    """What a :class:`~xditd.gpu_workers.models.family.Family` also has if its components take LoRAs."""

    @property
    def smallest(self) -> ConfigT:
        """A configuration with one block of each kind: but for numbers, its tensors have the names of all others."""

    @property
    def swapped_halves(self) -> Collection[str]:
        """Layers of the module whose outputs are two halves that diffusers' own layer has in the other order."""

    def lora_entries(self, config: ConfigT) -> Iterator[Entry]:
        """List the tensors of a checkpoint in every naming that LoRAs use, besides that of the module."""


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows ``start`` to ``stop`` of ``up``, and the outputs of the module's ``layer`` from ``at`` on: theirs."""

    layer: str
    start: int
    stop: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that a LoRA may name: its numbers of outputs and inputs, and the layers of the module that it is."""

    outputs: int
    inputs: int
    parts: tuple[LayerRows, ...]


def flat(name: str) -> str:
    """Return a name with ``_`` for dots."""
    return name.replace(".", "_")


def of_kind(part: LoraPart, kind: str) -> bool:
    """Return whether layers of this part of a LoRA are for components of this kind."""
    return kind == ("text_encoder" if part == "text_encoder" else "transformer")


def takes_loras(family: Any) -> TakesLoras[Any] | None:
    """Return the family as one whose components take LoRAs; ``None`` if they do not."""
    members = ("smallest", "swapped_halves", "lora_entries")
    return cast("TakesLoras[Any]", family) if all(hasattr(family, each) for each in members) else None


def targets_of(family: TakesLoras[Any], config: Hashable) -> dict[str, Target]:
    """Return the layers of a configuration by every name that a LoRA may have for them, with ``_`` for dots."""
    found: dict[str, Target] = {}
    for entry in family.lora_entries(config):
        if not entry.source.endswith(_WEIGHT) or len(entry.shape) != 2 or entry.view is not None:
            continue
        inputs = entry.shape[1]
        parts: list[LayerRows] = []
        start = 0
        for parameter, rows in entry.targets:
            layer = parameter.removesuffix(_WEIGHT)
            parts.append(LayerRows(layer, start, start + rows))
            found.setdefault(flat(layer), _whole(layer, rows, inputs, is_swapped=layer in family.swapped_halves))
            start += rows
        found[flat(entry.source.removesuffix(_WEIGHT))] = Target(entry.shape[0], inputs, tuple(parts))
    return found


def _whole(layer: str, outputs: int, inputs: int, *, is_swapped: bool) -> Target:
    if not is_swapped:
        return Target(outputs, inputs, (LayerRows(layer, 0, outputs),))
    half = outputs // 2
    return Target(outputs, inputs, (LayerRows(layer, 0, half, half), LayerRows(layer, half, outputs, 0)))


@cache
def _patterns() -> Mapping[str, tuple[Family[Any], frozenset[str]]]:
    """Return the names of layers of each family, with ``#`` for numbers."""
    found = {}
    for family in families():
        takes = takes_loras(family)
        if takes is not None:
            found[family.name] = (family, frozenset(map(_without_numbers, targets_of(takes, takes.smallest))))
    return found


def count_by_family(layers: Collection[LoraLayer]) -> tuple[dict[str, int], list[LoraLayer]]:
    """Count the layers of a LoRA whose names are those of each family, and list the layers of none."""
    counts: dict[str, int] = {}
    unknown: list[LoraLayer] = []
    for layer in layers:
        known = _families_of(layer)
        for name in known:
            counts[name] = counts.get(name, 0) + 1
        if not known:
            unknown.append(layer)
    return dict(sorted(counts.items(), key=lambda each: -each[1])), unknown


def text_encoders_of(layers: Collection[LoraLayer]) -> tuple[tuple[str, ...], ...]:
    """Return the families of text encoders that layers of a LoRA are of: for each kind of layers all that have them."""
    return tuple(sorted({tuple(_families_of(layer)) for layer in layers if layer.part == "text_encoder"} - {()}))


def _families_of(layer: LoraLayer) -> list[str]:
    pattern = _without_numbers(layer.target)
    return [
        name
        for name, (family, patterns) in _patterns().items()
        if of_kind(layer.part, family.kind) and pattern in patterns
    ]


def layers_for(family: Family[Any], layers: Collection[LoraLayer]) -> list[LoraLayer]:
    """Return the layers of a LoRA that are meant for a family: of text encoders those alone whose names it knows.

    One file may have the layers of several text encoders, but of one transformer.
    """
    of_part = [layer for layer in layers if of_kind(layer.part, family.kind)]
    if family.kind != "text_encoder":
        return of_part
    patterns = _patterns()[family.name][1]
    return [layer for layer in of_part if _without_numbers(layer.target) in patterns]


def _without_numbers(name: str) -> str:
    return _NUMBER.sub("#", name)
