"""The operations of one call of a block, as data: written as JSON, with a digest, and read as a graph of torch."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from xditd.gpu_workers.models import attention_operator, packed_operator
from xditd.ipc.errors import Unsupported

MAX_OPERATIONS: Final = 4_000
"""The most operations of a graph. Blocks of the classes in the tests have at most 653."""
MAX_BYTES: Final = 4 << 20
"""The longest graph, as JSON. Those of the classes in the tests take at most 56 KiB."""

_NAMESPACES: Final = frozenset({"aten"})
_OWN: Final = frozenset({attention_operator.NAME, packed_operator.NAME})
_SPECIAL: Final[Mapping[type, str]] = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}
"""Attributes of torch, written by their names."""


class NotCompiled(Unsupported):
    """A block cannot be compiled; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a graph: an input, or a result of an operation (of several, that of number ``item``)."""

    place: int
    item: int | None = None


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What a compiled graph depends on in a tensor: everything but its elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorKind:
        """Return the kind of a tensor; dimensions of size 1 have the strides of a contiguous tensor."""
        strides, dense = list(tensor.stride()), 1
        for dim in reversed(range(tensor.ndim)):
            if tensor.shape[dim] == 1:
                strides[dim] = dense  # the stride of a single entry is never used
            dense *= tensor.shape[dim]
        return cls(tuple(tensor.shape), tuple(strides), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        """Return a new tensor of this kind, with whatever its memory contains."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(slots=True)
class BlockGraph:
    """Inputs first, then operations: a ``Value`` is a place in both, one after the other."""

    inputs: list[TensorKind] = field(default_factory=list)
    operations: list[tuple[str, list[Any], dict[str, Any]]] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)

    def encode(self) -> bytes:
        """Return the graph as JSON: the same bytes for the same graph.

        Raises:
            NotCompiled: an operation has an argument that cannot be written, or there are too many.
        """
        if len(self.operations) > MAX_OPERATIONS:
            raise NotCompiled(f"a block computes more than {MAX_OPERATIONS} operations")
        tree = {
            "inputs": [
                [list(each.shape), list(each.strides), _name(each.dtype), str(each.device)] for each in self.inputs
            ],
            "operations": [[name, _encode(args), _encode(kwargs)] for name, args, kwargs in self.operations],
            "results": _encode(self.results),
        }
        encoded = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
        if len(encoded) > MAX_BYTES:
            raise NotCompiled("the operations of a block are too long to write")
        return encoded

    @classmethod
    def decode(cls, encoded: bytes) -> BlockGraph:
        """Return the graph that ``encode`` has written."""
        tree = json.loads(encoded)
        return cls(
            inputs=[
                TensorKind(tuple(shape), tuple(strides), getattr(torch, dtype), torch.device(device))
                for shape, strides, dtype, device in tree["inputs"]
            ],
            operations=[(name, _decode(args), _decode(kwargs)) for name, args, kwargs in tree["operations"]],
            results=_decode(tree["results"]),
        )

    def drop_unused_inputs(self) -> list[int]:
        """Drop the inputs that no operation takes; return the places that the others had."""
        places: set[int] = set()

        def note(value: Value) -> Value:
            places.add(value.place)
            return value

        _map((self.operations, self.results), note)
        count = len(self.inputs)
        kept = [place for place in range(count) if place in places]
        moved = {old: new for new, old in enumerate(kept)}

        def move(value: Value) -> Value:
            place = moved[value.place] if value.place < count else value.place - count + len(kept)
            return Value(place, value.item)

        self.inputs = [self.inputs[place] for place in kept]
        self.operations, self.results = _map((self.operations, self.results), move)
        return kept

    def to_torch(self) -> torch.fx.GraphModule:
        """Return a graph of torch that takes the inputs, and returns a tuple of the results.

        Raises:
            NotCompiled: an operation is not torch's own, nor one of those that stand for attentions and packed layers.
        """
        graph = torch.fx.Graph()
        nodes = [graph.placeholder(f"input_{number}") for number in range(len(self.inputs))]

        def node_of(value: Value) -> torch.fx.Node:
            node = nodes[value.place]
            return node if value.item is None else graph.call_function(operator.getitem, (node, value.item))

        for name, args, kwargs in self.operations:
            nodes.append(graph.call_function(_operator(name), tuple(_map(args, node_of)), _map(kwargs, node_of)))
        graph.output(tuple(_map(self.results, node_of)))
        return torch.fx.GraphModule(torch.nn.Module(), graph)


def digest_of(encoded: bytes) -> str:
    """Return the name of a graph: equal graphs, of whatever block, have the same one."""
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _operator(name: str) -> Any:
    namespace, function, overload = name.split(".")
    if namespace not in _NAMESPACES and name not in _OWN:
        raise NotCompiled(f"a block computes {name}, an operation of another library")
    return getattr(getattr(getattr(torch.ops, namespace), function), overload)


def operator_name(function: torch._ops.OpOverload) -> str:
    """Return the name by which a graph holds an operation.

    Raises:
        NotCompiled: the operation is of another library.
    """
    name = str(function)
    _operator(name)
    return name


def _map(tree: Any, change: Callable[[Value], Any]) -> Any:
    """Return nested lists, tuples and maps with each ``Value`` changed."""
    if isinstance(tree, Value):
        return change(tree)
    if isinstance(tree, list):
        return [_map(each, change) for each in tree]
    if isinstance(tree, tuple):
        return tuple(_map(each, change) for each in tree)
    return {key: _map(each, change) for key, each in tree.items()} if isinstance(tree, dict) else tree


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Value):
        return {"value": [value.place, value.item]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_encode(each) for each in value]}
    if isinstance(value, dict):
        return {"map": {key: _encode(each) for key, each in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if (kind := _SPECIAL.get(type(value))) is not None:
        return {kind: _name(value)}
    raise NotCompiled(f"an operation of a block takes a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "value":
        return Value(*held)
    if kind == "map":
        return {key: _decode(each) for key, each in held.items()}
    if kind == "device":
        return torch.device(held)
    if kind in _SPECIAL.values():
        return getattr(torch, held)
    return (list if kind == "list" else tuple)(_decode(each) for each in held)
