"""The tensors in arguments and results that hold objects, such as caches of keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from xditd.ipc.transports.module_walk import class_name, is_describable

Path = tuple[str | int, ...]
Change = Callable[[Path, str | None, torch.Tensor], torch.Tensor]
"""Returns what replaces a tensor. It takes the tensor's place, the name of the attribute of an object that holds it (or
``None``), and the tensor."""


def change_tensors(value: Any, change: Change, *, path: Path = (), attribute: str | None = None) -> Any:
    """Change the tensors of a value in their order; return the value, which is another one only if it is a tuple.

    Lists, maps and objects keep their identity.
    """
    if isinstance(value, torch.Tensor):
        return change(path, attribute, value)
    if type(value) is tuple:
        found = [change_tensors(each, change, path=(*path, n), attribute=attribute) for n, each in enumerate(value)]
        return value if all(new is old for new, old in zip(found, value, strict=True)) else tuple(found)
    for key, each in _entries(value):
        inner = key if isinstance(key, str) and is_object(value) else attribute
        new = change_tensors(each, change, path=(*path, key), attribute=inner)
        if new is not each:
            if is_object(value):
                setattr(value, str(key), new)
            else:
                value[key] = new
    return value


def objects_of(value: Any) -> Iterator[Any]:
    """Yield the objects in a value, outer ones first."""
    if is_object(value):
        yield value
    if type(value) is tuple:
        for each in value:
            yield from objects_of(each)
    for _, each in _entries(value):
        yield from objects_of(each)


def copy_objects(value: Any) -> Any:
    """Return a value with the same tensors in new lists, maps and objects."""
    kept: dict[int, Any] = {}

    def keep(_: Path, __: str | None, tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor)] = tensor
        return tensor

    change_tensors(value, keep)
    return copy.deepcopy(value, kept)


def plain_tree(value: Any, convert: Callable[[torch.Tensor], Any], *, everywhere: bool = True) -> Any:
    """Return a value with maps in place of objects, and tensors converted: all, or those of objects alone."""
    if isinstance(value, torch.Tensor):
        return convert(value) if everywhere else value
    if is_object(value):
        found = {name: plain_tree(each, convert) for name, each in vars(value).items()}
        return {"class": class_name(type(value)), **found}
    if isinstance(value, Mapping):
        return {key: plain_tree(each, convert, everywhere=everywhere) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        found_items = [plain_tree(each, convert, everywhere=everywhere) for each in value]
        return found_items if isinstance(value, list) else tuple(found_items)
    return value


def is_object(value: Any) -> bool:
    """Return whether a value is an object of a class, with tensors among its attributes perhaps."""
    containers = (torch.Tensor, torch.nn.Module, Mapping, list, tuple, set, frozenset)
    return not isinstance(value, containers) and is_describable(value)


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, list):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    return list(vars(value).items()) if is_object(value) else []
