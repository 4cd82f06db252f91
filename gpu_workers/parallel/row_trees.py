"""The rows of a batch in the arguments and the results of any module: find them, take some of them, and join results.

Nothing says which tensors of a class have a row for each image, so this is a rule, and it can be wrong:

- The batch is dimension 0 of the first tensor among the arguments, or the length of the first list of tensors.
- A tensor whose dimension 0 has that size has a row for each image.
- A list of that length has an item for each image, if it holds lists, or tensors that do not all have rows themselves.
- Everything else belongs to all images.

Whether it holds for a call is checked (:mod:`xditd.gpu_workers.models.split_checks`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch

Plain = bool | int | float | str | torch.dtype | None


@dataclass(frozen=True)
class Leaf:
    """A tensor of a result; ``has_rows``: dimension 0 has a row for each image."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    has_rows: bool = field(compare=False)


@dataclass(frozen=True)
class Branch:
    """A list, tuple, map or output class; ``has_rows``: it is a list with an item for each image."""

    kind: type
    keys: tuple[str, ...] | None
    children: tuple[Node, ...]
    has_rows: bool = field(compare=False)


@dataclass(frozen=True)
class Value:
    """A value that is no tensor, with its type: ``True``, ``1`` and ``1.0`` are different values."""

    kind: type
    value: Plain


Node = Leaf | Branch | Value
"""The structure of a result, without its tensors."""


def batch_of(arguments: Mapping[str, Any]) -> int:
    """Return the size of the batch; 0 if no argument has a tensor with dimensions."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]
        if isinstance(value, list) and value and all(isinstance(each, torch.Tensor) for each in value):
            return len(value)
        if isinstance(value, Mapping) and (found := batch_of(value)):
            return found
    return 0


def take_rows(tree: Any, batch: int, rows: slice) -> Any:
    """Return a tree with some rows of each tensor, as views, in new lists and maps."""
    if isinstance(tree, torch.Tensor):
        return tree[rows] if _has_rows(tree, batch) else tree
    if _is_list_of_rows(tree, batch):
        return [copy_tree(each) for each in tree[rows]]
    children = _children(tree)
    if children is None:
        return tree
    keys, items = children
    return _build(type(tree), keys, [take_rows(each, batch, rows) for each in items])


def copy_tree(tree: Any) -> Any:
    """Return a tree with the same tensors in new lists and maps, so that a forward may change those."""
    return take_rows(tree, 0, slice(None))


def map_tensors(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a tree with other tensors, in new lists and maps; what is no tensor, list, tuple or map stays."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    children = _children(tree)
    if children is None:
        return tree
    keys, items = children
    return _build(type(tree), keys, [map_tensors(each, change) for each in items])


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a tree of lists, tuples and maps in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif (children := _children(tree)) is not None:
        for each in children[1]:
            yield from tensors_of(each)


def structure_of(tree: Any, batch: int) -> Node | None:
    """Return the structure of a result, ``None`` if it holds objects."""
    if isinstance(tree, torch.Tensor):
        return Leaf(tuple(tree.shape), tree.dtype, tree.device.type, _has_rows(tree, batch))
    if isinstance(tree, Plain):
        return Value(type(tree), tree)
    children = _children(tree)
    if children is None:
        return None
    is_list_of_rows = _is_list_of_rows(tree, batch)
    nodes = [structure_of(each, 0 if is_list_of_rows else batch) for each in children[1]]
    if any(each is None for each in nodes):
        return None
    return Branch(type(tree), children[0], tuple(each for each in nodes if each is not None), is_list_of_rows)


def structure_of_rows(node: Node, rows: range) -> Node:
    """Return the structure that a result has for some of its rows."""
    if isinstance(node, Leaf) and node.has_rows:
        return replace(node, shape=(len(rows), *node.shape[1:]))
    if isinstance(node, Branch):
        if node.has_rows:
            return replace(node, children=node.children[rows.start : rows.stop])
        return replace(node, children=tuple(structure_of_rows(each, rows) for each in node.children))
    return node


def leaves_of(node: Node) -> Iterator[Leaf]:
    """Yield the tensors of a structure in order."""
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, Branch):
        for each in node.children:
            yield from leaves_of(each)


def build(node: Node, tensors: Iterator[torch.Tensor]) -> Any:
    """Make a result from its structure and its tensors, which are in the order of :func:`leaves_of`."""
    if isinstance(node, Leaf):
        return next(tensors)
    if isinstance(node, Value):
        return node.value
    return _build(node.kind, node.keys, [build(each, tensors) for each in node.children])


def join(node: Node, pieces: Sequence[Any]) -> Any:
    """Join the results of consecutive rows; ``node`` is the structure of the whole. What has no rows is taken from the
    first piece."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(node, Leaf):
        return torch.cat(list(pieces)) if node.has_rows else pieces[0]
    if isinstance(node, Value):
        return node.value
    items = [_items(each) for each in pieces]
    if node.has_rows:
        return [each for piece in items for each in piece]
    return _build(
        node.kind,
        node.keys,
        [join(child, each) for child, each in zip(node.children, zip(*items, strict=True), strict=True)],
    )


def _has_rows(tensor: torch.Tensor, batch: int) -> bool:
    return batch > 0 and tensor.ndim > 0 and tensor.shape[0] == batch


def _is_list_of_rows(value: Any, batch: int) -> bool:
    if batch == 0 or not isinstance(value, list) or len(value) != batch:
        return False
    if tensors := list(tensors_of(value)):
        return not all(_has_rows(each, batch) for each in tensors)
    return all(isinstance(each, list) for each in value)


def _children(value: Any) -> tuple[tuple[str, ...] | None, list[Any]] | None:
    """Return the keys and items of a list, tuple, map or output class; ``None`` for anything else."""
    if type(value) in (list, tuple):
        return None, list(value)
    if type(value) in (dict, OrderedDict) or (isinstance(value, OrderedDict) and is_dataclass(value)):
        return tuple(value), list(value.values())
    return None


def _items(value: Any) -> list[Any]:
    children = _children(value)
    assert children is not None
    return children[1]


def _build(kind: type, keys: tuple[str, ...] | None, items: list[Any]) -> Any:
    if keys is None:
        return kind(items)
    pairs = dict(zip(keys, items, strict=True))
    return kind(**pairs) if is_dataclass(kind) else kind(pairs)
