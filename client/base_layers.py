"""Describe a module without its LoRA layers: as if PEFT had never put them around its linear layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from xditd.ipc.module_state import ModuleState, SubmoduleState

if TYPE_CHECKING:
    import torch

BASE: Final = ".base_layer"
"""Where a layer of PEFT has the layer that it was put around."""


def with_base_layers(
    state: ModuleState, tensors: dict[str, torch.Tensor], paths: Collection[str]
) -> tuple[ModuleState, dict[str, torch.Tensor]]:
    """Return the description and the tensors of a module with the layers at ``paths`` replaced by their base layers.

    The order is that of a module without adapters, so that its description has the same bytes.
    """
    if not paths:
        return state, tensors
    wrapped = frozenset(paths)
    submodules: dict[str, SubmoduleState] = {}
    inside: str | None = None
    for path, each in state.submodules.items():  # parents come before what is in them, and no other module between
        if path in wrapped:
            inside = path
        elif inside is None or not path.startswith(f"{inside}."):
            inside = None
            submodules[path] = each
        elif path == inside + BASE:
            submodules[inside] = each
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        owner = _owner(name, wrapped)
        if owner is None:
            kept[name] = tensor
        elif name.startswith(f"{owner}{BASE}."):
            kept[owner + name[len(owner) + len(BASE) :]] = tensor
    packages = {each.class_name.partition(".")[0] for each in submodules.values()}
    versions = {name: version for name, version in state.versions.items() if name in packages or name == "torch"}
    return replace(state, submodules=submodules, versions=versions), kept


def _owner(name: str, wrapped: Collection[str]) -> str | None:
    """Return the path of the layer of PEFT in which a tensor is."""
    end = name.find(".")
    while end >= 0:
        if name[:end] in wrapped:
            return name[:end]
        end = name.find(".", end + 1)
    return None
