"""Find the blocks that a module repeats, which of them are alike, and why one cannot be compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Final

import torch

from xditd.gpu_workers.packed.linear import PackedLinear, packed_layers
from xditd.ipc.transports.module_walk import is_describable

_HOOKS: Final = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_OWN: Final = frozenset(vars(torch.nn.Module()))
"""Attributes of every module: its tensors, submodules and hooks."""

_ADAPTERS: Final = "peft"
"""The package of LoRA layers."""

_MAX_DEPTH: Final = 6


def find_blocks(module: torch.nn.Module) -> dict[str, torch.nn.Module] | str:
    """Return the repeated blocks of a module by path, or the reason why it has none.

    They are submodules of the classes that ``_repeated_blocks`` of diffusers' classes names. Without it they are those
    of lists with two or more submodules of one class, if they hold most parameters. None is inside another.
    """
    names = frozenset(getattr(module, "_repeated_blocks", None) or ())
    if names:
        found = _outermost({path: each for path, each in module.named_modules() if type(each).__name__ in names})
        return found or "its class names repeated blocks, of which it has none"
    listed: dict[str, torch.nn.Module] = {}
    for path, each in module.named_modules():
        if isinstance(each, torch.nn.ModuleList):
            counts = Counter(map(type, each))
            start = f"{path}." if path else ""
            listed |= {f"{start}{name}": one for name, one in each.named_children() if counts[type(one)] > 1}
    found = _outermost(listed)
    if 2 * sum(map(_count_weights, found.values())) < _count_weights(module):
        return "it has no repeated blocks that hold most of its parameters"
    return found or "it has no repeated blocks"


def _count_weights(module: torch.nn.Module) -> int:
    return sum(1 for _ in module.parameters()) + len(packed_layers(module))


def _outermost(found: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {
        path: each
        for path, each in found.items()
        if not any(path.startswith(f"{other}.") for other in found if other != path)
    }


def why_not(block: torch.nn.Module) -> str:
    """Return why a block cannot be compiled, or an empty text.

    Hooks on the block itself are no reason: they run around what is compiled.
    """
    for path, each in block.named_modules():
        where = path or "a block"
        if each.training:
            return f"{where} is in training mode"
        if "forward" in vars(each) or each._compiled_call_impl is not None:
            return f"the forward of {where} is changed"
        if path and any(getattr(each, name) for name in _HOOKS):
            return f"{where} of a block has hooks"
        if type(each).__module__.partition(".")[0] == _ADAPTERS:
            return f"{where} of a block is a LoRA layer"
        if getattr(each, "gradient_checkpointing", False):
            return f"{where} has gradient checkpointing on"
        if any(type(one) not in (torch.nn.Parameter, torch.Tensor) for one in _tensors(each)):
            return f"{where} of a block has tensors of another class"
    return ""


def _tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    for held in (module._parameters, module._buffers):
        yield from (each for each in held.values() if each is not None)


def state_key(block: torch.nn.Module) -> Hashable:
    """Return what two blocks have in common that compute the same operations: all but the elements of their tensors."""
    tensors = tuple((path, _kinds(each._parameters), _kinds(each._buffers)) for path, each in block.named_modules())
    return attributes_key(block), tensors


def attributes_key(block: torch.nn.Module) -> Hashable:
    """Return the classes and the attributes of a block, without its tensors and packed weights."""
    return tuple((path, type(each), _attributes(each)) for path, each in block.named_modules())


def _attributes(module: torch.nn.Module) -> Hashable:
    if isinstance(module, PackedLinear):  # an operator in graphs, of which only this is known
        return module.in_features, module.out_features
    return tuple((name, _key(value, 0)) for name, value in vars(module).items() if name not in _OWN | {"forward"})


def _kinds(held: Mapping[str, torch.Tensor | None]) -> Hashable:
    return tuple((name, None if each is None else (tuple(each.shape), each.dtype)) for name, each in held.items())


def _key(value: Any, depth: int) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if depth < _MAX_DEPTH:
        if isinstance(value, (list, tuple)):
            return type(value), tuple(_key(each, depth + 1) for each in value)
        if isinstance(value, Mapping):
            return type(value), tuple((repr(name), _key(each, depth + 1)) for name, each in value.items())
        if isinstance(value, torch.nn.Module):
            return "module", type(value)
        if is_describable(value):
            return type(value), _key(vars(value), depth + 1)
    return type(value), id(value)
