"""Read the results of modules that run as their class, and bring the new state of arguments back to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

import torch

from xditd.client.jobs.held_tensors import HeldStore, HeldTensor
from xditd.ipc.arguments import (
    Argument,
    Given,
    Held,
    InIo,
    ListOf,
    MapOf,
    Named,
    ObjectOf,
    Opaque,
    OutputOf,
    PairsOf,
    SetOf,
    Special,
    TupleOf,
    given_value,
)
from xditd.ipc.errors import Internal, Unsupported
from xditd.ipc.module_state import STATE
from xditd.ipc.transports.module_classes import find_class, find_named
from xditd.ipc.transports.module_walk import class_name

_HERE: Final = "this process"


class NotReturned:
    """A part of a result that stays in the workers: any use of it raises ``Unsupported``."""

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "_what", what)

    def __getattr__(self, name: str) -> Any:
        self._refuse(name)

    def __bool__(self) -> bool:
        self._refuse("the truth")

    def __len__(self) -> int:
        self._refuse("the length")

    def __iter__(self) -> Iterator[Any]:
        self._refuse("the items")

    def __getitem__(self, key: object) -> Any:
        self._refuse(f"item {key!r}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        self._refuse("a call")

    def _refuse(self, name: str) -> NoReturn:
        what = object.__getattribute__(self, "_what")
        raise Unsupported(f"{name} of a result: the {what} was not sent by the workers; leave it out of the call")

    def __repr__(self) -> str:
        return f"<NotReturned {object.__getattribute__(self, '_what')}>"


class ClassResultReader:
    """Reads the results of one call.

    ``read`` copies a tensor out of the block with the results to ``device``. ``store`` reads and frees the tensors that
    stay in the workers. ``parts`` are the arguments of each part of the call: a result that is a value among them is
    the caller's own object.
    """

    def __init__(
        self,
        read: Callable[[InIo, torch.device], torch.Tensor],
        device: torch.device,
        store: HeldStore,
        parts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._read = read
        self._device = device
        self._store = store
        self._parts = parts

    def value(self, node: Argument) -> Any:
        """Return a result, in the caller's own classes. The tensors are copies in this process, or held tensors.

        Read results before :meth:`update`, which may move the values to which they refer.

        Raises:
            Unsupported: a class that is not installed here.
            Internal: a description that the workers do not give to results.
        """
        if isinstance(node, InIo):
            found = self._read(node, self._device)
            return found if node.order is None else found.permute(node.order)
        if isinstance(node, Held):
            return self._store.tensor(node, self._device)
        if isinstance(node, Given):
            try:
                return given_value(node, self._parts)
            except LookupError as error:
                raise Internal(f"the workers answered with an argument that the call does not have: {node}") from error
        if isinstance(node, OutputOf):
            return find_class(node.class_name, _HERE)(**{key: self.value(each) for key, each in node.items.items()})
        if isinstance(node, ObjectOf):
            kind = find_class(node.class_name, _HERE)
            made: Any = object.__new__(kind)
            vars(made).update({key: self.value(each) for key, each in node.attributes.items()})
            return made
        if isinstance(node, (ListOf, TupleOf, SetOf)):
            items = [self.value(each) for each in node.items]
            return items if isinstance(node, ListOf) else tuple(items) if isinstance(node, TupleOf) else set(items)
        if isinstance(node, MapOf):
            return {key: self.value(each) for key, each in node.items.items()}
        if isinstance(node, PairsOf):
            return {self.value(key): self.value(each) for key, each in node.items}
        return _plain(node)

    def update(self, node: Argument, current: Any) -> Any:
        """Return an argument after a call: ``current`` itself with its new contents, where it is of the same kind.

        Raises:
            Unsupported, Internal: see :meth:`value`.
        """
        if isinstance(node, Held) and isinstance(current, HeldTensor) and current.held.held_id == node.held_id:
            return current
        if isinstance(node, ObjectOf) and isinstance(current, torch.Generator):
            current.set_state(self.value(node.attributes[STATE]).cpu())
            return current
        if isinstance(node, ObjectOf) and hasattr(current, "__dict__") and class_name(type(current)) == node.class_name:
            attributes = vars(current)
            found = {key: self.update(each, attributes.get(key)) for key, each in node.attributes.items()}
            attributes.clear()
            attributes.update(found)
            return current
        if isinstance(node, ListOf) and isinstance(current, list):
            padded = [*current, *[None] * len(node.items)]
            current[:] = [self.update(each, old) for each, old in zip(node.items, padded, strict=False)]
            return current
        if isinstance(node, MapOf) and isinstance(current, dict):
            return _replace(current, {key: self.update(each, current.get(key)) for key, each in node.items.items()})
        if isinstance(node, PairsOf) and isinstance(current, dict):
            keys = [self.value(key) for key, _ in node.items]
            pairs = zip(keys, node.items, strict=True)
            return _replace(current, {key: self.update(each, current.get(key)) for key, (_, each) in pairs})
        if isinstance(node, TupleOf) and isinstance(current, tuple) and len(current) == len(node.items):
            return tuple(self.update(each, old) for each, old in zip(node.items, current, strict=True))
        return self.value(node)


def _replace(current: dict[Any, Any], items: Mapping[Any, Any]) -> dict[Any, Any]:
    current.clear()
    current.update(items)
    return current


def _plain(node: Argument) -> Any:
    if isinstance(node, Special):
        return float(node.value)
    if isinstance(node, Opaque):
        return NotReturned(node.text)
    if isinstance(node, Named):
        return find_named(node.name, _HERE)
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise Internal(f"the workers answered a call with {type(node).__name__}, which no client can read")
