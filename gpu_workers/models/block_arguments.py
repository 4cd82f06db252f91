"""The arguments and the results of a block: their tensors, and a key of all else that a compiled graph depends on."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from xditd.gpu_workers.models.block_graphs import NotCompiled

_CONSTANTS: Final = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.memory_format,
    enum.Enum,
)
_TENSORS: Final = (torch.Tensor, torch.nn.Parameter)


def take_tensors(values: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Add each tensor of nested values once; return the key of the values.

    Raises:
        NotCompiled: they hold an object, of which it is not known what a block reads.
    """
    return _take(values, tensors, {})


def _take(value: Any, tensors: list[torch.Tensor], places: dict[int, int]) -> Hashable:
    kind = type(value)
    if kind in _TENSORS:
        place = places.get(id(value))
        if place is not None:  # the same tensor again: a graph has it as one input
            return place
        places[id(value)] = len(tensors)
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if kind is tuple or kind is list:
        return kind, tuple(_take(each, tensors, places) for each in value)
    if kind is dict:
        return kind, tuple((name, _take(each, tensors, places)) for name, each in value.items())
    if isinstance(value, _CONSTANTS):
        return kind, value  # 1, 1.0 and True are equal
    raise NotCompiled(f"a block takes an argument of the type {kind.__name__}")


@dataclass(frozen=True, slots=True)
class Place:
    """What stands for a tensor of a block's result: the number of an argument's tensor, or of a result of the graph."""

    is_argument: bool
    number: int


def put_places(value: Any, place_of: Callable[[torch.Tensor], Place]) -> Any:
    """Return nested results with the place of each tensor in its stead; :func:`fill_places` is the reverse.

    Raises:
        NotCompiled: they hold an object, which a graph cannot return.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return place_of(value)
    if kind is tuple or kind is list:
        return kind(put_places(each, place_of) for each in value)
    if kind is dict:
        return {name: put_places(each, place_of) for name, each in value.items()}
    if isinstance(value, _CONSTANTS):
        return value
    raise NotCompiled(f"a block returns a {kind.__name__}")


def fill_places(tree: Any, arguments: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> Any:
    """Return nested results with the tensors of their places."""
    if isinstance(tree, Place):
        return arguments[tree.number] if tree.is_argument else results[tree.number]
    if isinstance(tree, (tuple, list)):
        return type(tree)(fill_places(each, arguments, results) for each in tree)
    if isinstance(tree, Mapping):
        return {name: fill_places(each, arguments, results) for name, each in tree.items()}
    return tree
