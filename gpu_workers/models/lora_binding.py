"""Lent LoRAs: their factors, bound to the layers of the models that jobs use them with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from xditd.gpu_workers.kernels.branches import Branch, Branches, Strength
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.lora_targets import Target, layers_for, takes_loras, targets_of
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.loras import LoraDescription, LoraLayer
from xditd.ipc.name_lists import SENTENCE_CHARS, listed

FEWEST = 0.5
"""The least share of a LoRA's layers that a model has to have: relatives of a model share some names with it."""


AnyModel = CachedModel | ClassModel

_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class BoundLora:
    """A LoRA's branches in one model. ``unknown`` are factors whose layers the model does not have.

    ``number`` is that of no other one. What outlives a job compares it: a reference would keep lent memory mapped.
    """

    number: int
    strength: Strength
    slots: tuple[tuple[Branches, tuple[Branch, ...]], ...]
    unknown: tuple[str, ...]
    first: tuple[str, torch.dtype] | None = None
    """A layer, and the dtype in which its branch computes."""


class LentLora:
    """A lent LoRA in the place of a model: it is never run itself. ``owner`` is its component id while it is plugged.

    It holds its factors as they are lent, and copies of them in the compute dtypes of models that need another one.
    """

    scratch_bytes = 0

    def __init__(self, label: str, description: LoraDescription) -> None:
        self.label = label
        self.description = description
        self.owner: str | None = None
        self._factors: Mapping[str, torch.Tensor | PackedTensor] = {}
        self._converted: dict[torch.dtype, dict[str, torch.Tensor]] = {}
        self._bound: WeakKeyDictionary[AnyModel, BoundLora] = WeakKeyDictionary()  # models may go before their LoRAs

    @property
    def converted_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(each.nbytes for factors in self._converted.values() for each in factors.values())

    def plug(self, bindings: Bindings, owner: str = "", _: object = None) -> None:
        """Hold these factors until :meth:`unplug` or the next call."""
        self.unplug()
        self._factors, self.owner = bindings, owner

    def unplug(self) -> None:
        """Drop all references to lent memory, and the copies."""
        self._bound.clear()
        self._converted.clear()
        self._factors, self.owner = {}, None

    def release(self, *, is_lent: bool = False) -> None:
        """Nothing is reserved."""

    def is_bound_to(self, model: AnyModel) -> bool:
        found = self._bound.get(model)
        return found is not None and self._fits(found, model)

    def _fits(self, bound: BoundLora, model: AnyModel) -> bool:
        return (
            self.description.keeps_dtypes or bound.first is None or model.branch_dtype(bound.first[0]) == bound.first[1]
        )

    def bind(self, model: AnyModel) -> BoundLora:
        """Find its layers in a model, once, and convert its factors into the compute dtypes of these, as PEFT does.

        Those that PEFT has loaded already keep their dtypes.

        Raises:
            Unsupported: the model's family takes no LoRAs.
            BadRequest: the LoRA is of another model: most of its layers are not in this one, or have other sizes.
            torch.OutOfMemoryError: there is no memory for the copies.
        """
        found = self._bound.get(model)
        if found is None or not self._fits(found, model):  # a module may get weights of another dtype
            found = self._bound[model] = self._bind(model)
        return found

    def _bind(self, model: AnyModel) -> BoundLora:
        layers, targets = self._find(model)
        known = [layer for layer in layers if layer.target in targets]
        self._check(model, layers, {layer: targets[layer.target] for layer in known})
        strength = Strength(next(_numbers))
        by_layer: dict[str, tuple[Branch, ...]] = {}
        for layer in known:
            first, outputs = layer.start or 0, self._sizes(layer)[1]
            for part in targets[layer.target].parts:
                start, stop = max(part.start, first), min(part.stop, first + outputs)
                if start < stop:
                    dtype = None if self.description.keeps_dtypes else model.branch_dtype(part.layer)
                    down, up = (self._factor_in(dtype, name) for name in (layer.down, layer.up))
                    rows = up[start - first : stop - first]
                    branch = Branch(down, rows, layer.scale, strength, part.at + start - part.start)
                    by_layer[part.layer] = (*by_layer.get(part.layer, ()), branch)
        slots = tuple(model.branch_slots(by_layer))
        unknown = tuple(layer.down for layer in layers if layer.target not in targets)
        one = next(((layer, branches[0].up.dtype) for layer, branches in by_layer.items()), None)
        return BoundLora(strength.number, strength, slots, unknown, one)

    def _find(self, model: AnyModel) -> tuple[list[LoraLayer], Mapping[str, Target]]:
        """Return the layers that are meant for a model, and those that the model has, by their names in LoRAs."""
        if isinstance(model, ClassModel):
            return [each for each in self.description.layers if each.part == model.lora_part], model.lora_targets
        family = takes_loras(model.family)
        if family is None or self.description.as_class:
            why = "takes no LoRAs" if family is None else "is of a family, and this LoRA was lent with as_class"
            remedy = "merge it into the weights, and lend those" if family is None else "lend it without"
            raise Unsupported(f"LoRA {self.label}: {model.title} {why}; {remedy}")
        return layers_for(model.family, self.description.layers), targets_of(family, model.config)

    def _check(self, model: AnyModel, layers: list[LoraLayer], targets: Mapping[LoraLayer, Target]) -> None:
        what = f"LoRA {self.label}"
        if not layers:
            kind = model.title if isinstance(model, ClassModel) else f"a {model.family.kind.replace('_', ' ')}"
            raise BadRequest(f"{what}: it has no layers of {kind}; use it with the component that it is for")
        if len(targets) < FEWEST * len(layers):
            names = [layer.down for layer in layers if layer not in targets]
            raise BadRequest(
                f"{what} is of another model: this {model.title} has {len(targets)} of its {len(layers)} layers; "
                f"it lacks {listed(names)}",
                names=names,
            )
        faults = []
        for layer, target in targets.items():
            inputs, outputs = self._sizes(layer)
            fits = outputs == target.outputs if layer.start is None else layer.start + outputs <= target.outputs
            if inputs != target.inputs or not fits:
                first = "" if layer.start is None else f" from {layer.start} on"
                faults.append(
                    f"{layer.down} and {layer.up} are of a layer with {inputs} inputs and {outputs} outputs{first}, "
                    f"the model's has {target.inputs} and {target.outputs}"
                )
            for part in target.parts:
                if part.layer not in model.branches:
                    faults.append(f"{layer.down} is of {part.layer}, which is no linear layer")
        if faults:
            raise BadRequest(
                f"{what} is of another model than this {model.title}: "
                f"{listed(faults, joint='; ', chars=SENTENCE_CHARS)}",
                names=faults,
            )

    def _sizes(self, layer: LoraLayer) -> tuple[int, int]:
        return self._factors[layer.down].shape[1], self._factors[layer.up].shape[0]

    def _factor_in(self, dtype: torch.dtype | None, name: str) -> torch.Tensor:
        """Return a factor in a dtype, without one in its own: as it is lent, or a copy that is kept."""
        lent = self._factors[name]
        assert isinstance(lent, torch.Tensor)
        if dtype is None or lent.dtype == dtype:
            return lent
        converted = self._converted.setdefault(dtype, {})
        if name not in converted:
            converted[name] = lent.to(dtype)
        return converted[name]
