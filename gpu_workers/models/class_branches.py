"""LoRAs beside the linear layers of a module that runs as its class, computed as the layers of PEFT do.

A layer has another class only while a job has LoRAs for it. So jobs without LoRAs, and whatever looks at the classes of
layers (compiled blocks, packed weights), find the module as its class makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.branches import Branch, Branches, add_as_peft, added
from xditd.gpu_workers.models.lora_targets import LayerRows, Target, flat
from xditd.gpu_workers.packed.linear import PackedLinear

_KEY = "lora_branches"


class _LinearWithBranches(torch.nn.Linear):
    """A plain linear layer while a job has LoRAs for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches: LayerBranches = self.__dict__[_KEY]
        y = super().forward(x)
        return add_static(branches.static, y, x) if branches.static else add_as_peft(branches.active, y, x)


class StaticBranch(NamedTuple):
    """A branch in memory that graphs read: ``factor`` is its scale by its strength, float32, on the device."""

    down: torch.Tensor
    up: torch.Tensor
    factor: torch.Tensor
    start: int


class LayerBranches(Branches):
    """The branches beside a plain linear layer, which has another class while there are any."""

    __slots__ = ("_active", "_layer", "_static")

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer
        self.pair = None
        self._active: tuple[Branch, ...] = ()
        self._static: tuple[StaticBranch, ...] = ()

    @property
    def active(self) -> tuple[Branch, ...]:
        """Those of the LoRAs of the job at hand."""
        return self._active

    @active.setter
    def active(self, branches: tuple[Branch, ...]) -> None:
        self._active = branches
        self._set_class()

    @property
    def static(self) -> tuple[StaticBranch, ...]:
        """Those that a graph reads, in place of the others; none outside of forwards that may be captured."""
        return self._static

    @static.setter
    def static(self, branches: tuple[StaticBranch, ...]) -> None:
        self._static = branches
        self._set_class()

    def _set_class(self) -> None:
        has_any = bool(self._active or self._static)
        if has_any == (_KEY in self._layer.__dict__):
            return
        if has_any:
            self._layer.__dict__[_KEY] = self
            self._layer.__class__ = _LinearWithBranches  # its parameters, hooks and attributes stay
        else:
            self._layer.__class__ = torch.nn.Linear
            del self._layer.__dict__[_KEY]


def add_static(branches: Sequence[StaticBranch], y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Do what :func:`add_as_peft` does, with its bits; the host has no factor."""
    dtype = y.dtype
    for branch in branches:
        x = x.to(branch.down.dtype)
        part = F.linear(F.linear(x, branch.down), branch.up)
        # A number of the host is multiplied in float32, one on the device in the dtype of the tensor.
        y = added(y, (part.float() * branch.factor).to(part.dtype), branch.start)
    return y.to(dtype)


def branches_of(module: torch.nn.Module) -> dict[str, Branches]:
    """Return the branches of all plain and packed linear layers, by the layers' names. No layer changes yet."""
    found: dict[str, Branches] = {}
    for path, layer in module.named_modules():
        if type(layer) is torch.nn.Linear:
            found[path] = LayerBranches(layer)
        elif isinstance(layer, PackedLinear):
            found[path] = layer.branches
    return found


def targets_in(module: torch.nn.Module, branches: Mapping[str, Branches]) -> dict[str, Target]:
    """Return the layers with branches by their names with ``_`` for dots; without those whose names are then alike."""
    found: dict[str, Target] = {}
    alike: set[str] = set()
    for path in branches:
        layer = module.get_submodule(path)
        assert isinstance(layer, torch.nn.Linear | PackedLinear)
        if flat(path) in found:
            alike.add(flat(path))
        rows = LayerRows(path, 0, layer.out_features)
        found[flat(path)] = Target(layer.out_features, layer.in_features, (rows,))
    return {name: target for name, target in found.items() if name not in alike}
