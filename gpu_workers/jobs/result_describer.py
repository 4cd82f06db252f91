"""Describe the results of modules that run as their class, and the state of their arguments after a forward."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Final

import torch

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.writing import Write
from xditd.ipc.arguments import (
    Argument,
    Held,
    ListOf,
    MapOf,
    ObjectOf,
    Opaque,
    OutputOf,
    PairsOf,
    SetOf,
    TupleOf,
)
from xditd.ipc.module_state import DEVICE, GENERATOR, STATE
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call
from xditd.ipc.transports.module_walk import class_name, describe_constant, is_describable
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
        for described, part in zip(job.parts, parts, strict=True):
            for name, node in described.arguments.items():
                self._note(node, part[name])

    def _note(self, node: Argument, value: Any) -> None:
        """Remember which tensors of the arguments are held, and under which ids."""
        if isinstance(node, Held):
            self._leaves[id(value)] = node, value
        elif isinstance(node, ObjectOf):
            for key, each in node.attributes.items() if node.class_name != GENERATOR else ():
                self._note(each, vars(value)[key])
        elif isinstance(node, (ListOf, TupleOf)):
            for each, inner in zip(node.items, value, strict=True):
                self._note(each, inner)
        elif isinstance(node, MapOf):
            for key, each in node.items.items():
                self._note(each, value[key])
        elif isinstance(node, PairsOf):
            for (_, each), inner in zip(node.items, value.values(), strict=True):
                self._note(each, inner)

    def describe(self, value: Any, write: Write) -> Argument:
        """Describe a result, or an argument after the forward."""
        return self._describe(value, write, is_cache=False)

    def _describe(self, value: Any, write: Write, *, is_cache: bool) -> Argument:
        if isinstance(value, torch.Tensor):
            return self._hold(value) if is_cache else write(value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, enum.Enum)):
            return describe_constant(value)
        if isinstance(value, (set, frozenset)):
            ordered = sorted(value, key=repr)  # as on every other rank
            return SetOf(items=tuple(self._describe(each, write, is_cache=is_cache) for each in ordered))
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return TupleOf(items=tuple(self._describe(each, write, is_cache=is_cache) for each in value))
        if isinstance(value, list):
            return ListOf(items=tuple(self._describe(each, write, is_cache=is_cache) for each in value))
        if isinstance(value, Mapping):
            return self._map(value, write, is_cache=is_cache)
        if isinstance(value, torch.Generator):
            attributes: dict[str, Argument] = {DEVICE: value.device.type, STATE: write(value.get_state())}
            return ObjectOf(class_name=GENERATOR, attributes=attributes)
        if is_describable(value):
            name = class_name(type(value))
            is_cache = is_cache or CACHE in name.lower()
            attributes = {key: self._describe(each, write, is_cache=is_cache) for key, each in vars(value).items()}
            return ObjectOf(class_name=name, attributes=attributes)
        return Opaque(text=class_name(type(value)))

    def _map(self, value: Mapping[Any, Any], write: Write, *, is_cache: bool) -> Argument:
        if is_dataclass(value):  # the output classes of diffusers and transformers
            items = {str(key): self._describe(each, write, is_cache=is_cache) for key, each in value.items()}
            return OutputOf(class_name=class_name(type(value)), items=items)
        if all(isinstance(key, str) for key in value):
            return MapOf(items={key: self._describe(each, write, is_cache=is_cache) for key, each in value.items()})
        return PairsOf(
            items=tuple(
                (describe_constant(key), self._describe(each, write, is_cache=is_cache)) for key, each in value.items()
            )
        )

    def _hold(self, tensor: torch.Tensor) -> Held:
        known = self._leaves.get(id(tensor))
        if known is not None:
            return known[0]
        leaf = Held(
            held_id=self._held.hold(self._client, tensor),
            dtype=dtype_name(tensor.dtype, "cache"),
            shape=tuple(tensor.shape),
        )
        self._leaves[id(tensor)] = leaf, tensor
        return leaf
