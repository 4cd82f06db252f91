"""Which calls go through device memory, and how much room their results get there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from xditd.client.session import Session
from xditd.ipc import limits
from xditd.ipc.arguments import Argument, InIo, children
from xditd.ipc.replies import Called
from xditd.ipc.transports.tensor_views import align

Key = tuple[str, str]
"""Calls of one kind: the id of a component, and its method."""


@dataclass(frozen=True)
class Room:
    """Room that a call gives its results: at least ``host_bytes`` in host memory.

    ``is_on_device``: large tensors on a GPU, and large results, stay there. ``device_bytes`` is what the results of the
    last such call took; ``None``: not known.
    """

    host_bytes: int = 0
    is_on_device: bool = False
    device_bytes: int | None = None


class DeviceUse:
    """Remembers, for the calls of one client, what went through device memory. Safe to use from several threads."""

    def __init__(self) -> None:
        self._refused: weakref.WeakSet[Session] = weakref.WeakSet()
        self._result_bytes: dict[Key, int] = {}
        self._unwritten: set[Key] = set()
        """Calls whose results rank 0 cannot write to the caller's GPU."""

    def room(self, session: Session, key: Key) -> Room:
        """Return the room for the results of the next call of ``key`` in a session."""
        device_bytes = 0 if key in self._unwritten else self._result_bytes.get(key)
        return Room(is_on_device=session not in self._refused, device_bytes=device_bytes)

    def refuse(self, session: Session) -> None:
        """Use host memory for all further calls of a session: its workers cannot map this process's device memory."""
        self._refused.add(session)

    def note_results(self, key: Key, called: Called, offered_bytes: int) -> None:
        """Note how much device memory the large results of a call need; the call had ``offered_bytes``."""
        trees = [*called.results, *(node for each in called.changed for node in each.values())]
        large = [leaf for tree in trees for leaf in _leaves(tree) if _size_bytes(leaf) >= limits.DEVICE_IO_FROM_BYTES]
        needed = sum(align(_size_bytes(leaf)) for leaf in large)
        self._result_bytes[key] = needed
        if 0 < needed <= offered_bytes and not any(leaf.in_device_io for leaf in large):
            self._unwritten.add(key)


def _leaves(tree: Argument) -> Iterator[InIo]:
    if isinstance(tree, InIo):
        yield tree
    else:
        for _, each in children("", tree):
            yield from _leaves(each)


def _size_bytes(leaf: InIo) -> int:
    return leaf.place.size_bytes
