"""Describe the results of modules that run as their class, and the state of their arguments after a forward."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Final

import torch
from msgspec.structs import replace

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.writing import Write
from xditd.ipc.arguments import (
    Argument,
    Given,
    Held,
    InIo,
    ListOf,
    MapOf,
    ObjectOf,
    Opaque,
    OutputOf,
    PairsOf,
    SetOf,
    TupleOf,
    Values,
    children,
    given_value,
    holds,
    inner_values,
)
from xditd.ipc.errors import Internal
from xditd.ipc.module_state import DEVICE, GENERATOR, STATE
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call
from xditd.ipc.transports.module_walk import class_name, describe_class, describe_constant, is_describable
from xditd.ipc.transports.tensor_views import dtype_name

CACHE: Final = "cache"
"""In the names of arguments and classes whose contents stay in the workers between calls."""


class ResultDescriber:
    """Describes results and the state of arguments.

    Tensors of caches stay in the workers: each is held under an id, the same on all ranks. Make it before the
    forwards run: it notes the ids of those that the client sent.
    """

    def __init__(
        self, held: HeldTensors, client: ProcessIdentity, job: Call, parts: Sequence[Mapping[str, Any]]
    ) -> None:
        self._held = held
        self._client = client
        self._leaves: dict[int, tuple[Held, torch.Tensor]] = {}
        self._given: dict[int, tuple[Given, Any]] = {}
        """By id, the values of arguments that a result may be, which this keeps alive."""
        self._parts = parts
        for number, (described, part) in enumerate(zip(job.parts, parts, strict=True)):
            for name, node in described.arguments.items():
                is_stateful = holds(node, ObjectOf) or CACHE in name.lower()
                self._note(Given(part=number, name=name), node, part[name], is_stateful=is_stateful)

    def _note(self, where: Given, node: Argument, value: Any, *, is_stateful: bool) -> None:
        """Remember the values among the arguments that the client has too, and which tensors are held."""
        if isinstance(node, Held):
            self._leaves[id(value)] = node, value
        # A tensor of an object may have been written to: then the object's new state has the tensor.
        is_unwritten = isinstance(node, Values) or (isinstance(node, InIo) and node.kept_id is None)
        if isinstance(node, (ObjectOf, ListOf, MapOf, PairsOf)) or (is_unwritten and not is_stateful):
            self._given.setdefault(id(value), (where, value))
        inner = list(children("", node))
        if not inner or isinstance(node, SetOf) or (isinstance(node, ObjectOf) and node.class_name == GENERATOR):
            return
        found = inner_values(value)
        if len(inner) != len(found):
            raise Internal(
                f"argument {where.name}: a {type(value).__name__} at {list(where.path)} has {len(found)} values, of "
                f"{len(inner)} that the client describes"
            )
        for number, ((_, each), made) in enumerate(zip(inner, found, strict=True)):
            self._note(replace(where, path=(*where.path, number)), each, made, is_stateful=is_stateful)

    def describe(self, value: Any, write: Write) -> Argument:
        """Describe a result."""
        return self._describe(value, write, is_cache=False, is_result=True)

    def describe_state(self, value: Any, write: Write) -> Argument:
        """Describe an argument after the forward, with all that it holds."""
        return self._describe(value, write, is_cache=False, is_result=False)

    def _find_given(self, value: Any) -> Given | None:
        """Return the reference to a value that is where the client has it, also after the forward."""
        where, _ = self._given.get(id(value), (None, None))
        if where is None:
            return None
        try:
            return where if given_value(where, self._parts) is value else None
        except LookupError:
            return None

    def _describe(self, value: Any, write: Write, *, is_cache: bool, is_result: bool) -> Argument:
        if is_result and (given := self._find_given(value)) is not None:
            return given
        if isinstance(value, torch.Tensor):
            return self._hold(value) if is_cache else write(value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, enum.Enum)):
            return describe_constant(value)
        if isinstance(value, type):
            return describe_class(value)
        if isinstance(value, torch.Generator):
            attributes: dict[str, Argument] = {DEVICE: value.device.type, STATE: write(value.get_state())}
            return ObjectOf(class_name=GENERATOR, attributes=attributes)
        is_object = not isinstance(value, Mapping) and is_describable(value)
        is_cache = is_cache or (is_object and CACHE in class_name(type(value)).lower())
        inner = partial(self._describe, write=write, is_cache=is_cache, is_result=is_result)
        if isinstance(value, (set, frozenset)):
            return SetOf(items=tuple(map(inner, sorted(value, key=repr))))  # in the order of every other rank
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return TupleOf(items=tuple(map(inner, value)))
        if isinstance(value, list):
            return ListOf(items=tuple(map(inner, value)))
        if isinstance(value, Mapping):
            return _map(value, inner)
        if is_object:
            attributes = {key: inner(each) for key, each in vars(value).items()}
            return ObjectOf(class_name=class_name(type(value)), attributes=attributes)
        return Opaque(text=class_name(type(value)))

    def _hold(self, tensor: torch.Tensor) -> Held:
        known = self._leaves.get(id(tensor))
        if known is not None:
            return known[0]
        leaf = Held(
            held_id=self._held.hold(self._client, tensor),
            dtype=dtype_name(tensor.dtype, "cache"),
            shape=self._held.shares.shape_of(tensor),
        )
        self._leaves[id(tensor)] = leaf, tensor
        return leaf


def _map(value: Mapping[Any, Any], inner: Callable[[Any], Argument]) -> Argument:
    if is_dataclass(value):  # the output classes of diffusers and transformers
        items = {str(key): inner(each) for key, each in value.items()}
        return OutputOf(class_name=class_name(type(value)), items=items)
    if all(isinstance(key, str) for key in value):
        return MapOf(items={key: inner(each) for key, each in value.items()})
    return PairsOf(items=tuple((describe_constant(key), inner(each)) for key, each in value.items()))
