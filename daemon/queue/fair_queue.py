"""Who goes next: clients take turns, and within one client the older request goes first."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from xditd.daemon.sockets.sessions import Session
from xditd.ipc.processes import ProcessIdentity


class Owned(Protocol):
    @property
    def session(self) -> Session: ...


J = TypeVar("J", bound=Owned)


class Turns(Generic[J]):
    """Waiting items. Processes take turns, the sessions of one process take turns, a session's items are in order.

    By process first: a program that opens many connections has one turn, like the others.
    """

    def __init__(self) -> None:
        self._processes: OrderedDict[ProcessIdentity, OrderedDict[Session, deque[J]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[J]:
        """Every item, in the order in which they will go if nothing else comes."""
        rest = [
            deque(deque(items) for items in sessions.values()) for sessions in self._processes.values()
        ]  # a copy, to be used up
        processes = deque(rest)
        while processes:
            sessions = processes.popleft()
            items = sessions.popleft()
            yield items.popleft()
            if items:
                sessions.append(items)
            if sessions:
                processes.append(sessions)

    @property
    def clients(self) -> int:
        """How many processes wait."""
        return len(self._processes)

    def of_process(self, process: ProcessIdentity) -> Iterator[J]:
        """One client's items, session by session."""
        for items in self._processes.get(process, {}).values():
            yield from items

    def add(self, item: J) -> None:
        sessions = self._processes.setdefault(item.session.process, OrderedDict())
        sessions.setdefault(item.session, deque()).append(item)
        self._count += 1

    def take(self) -> J | None:
        """Remove and return what goes next; its process and its session go to the back of their rows."""
        if not self._processes:
            return None
        process, sessions = self._processes.popitem(last=False)
        session, items = sessions.popitem(last=False)
        item = items.popleft()
        self._count -= 1
        if items:
            sessions[session] = items
        if sessions:
            self._processes[process] = sessions
        return item

    def remove(self, item: J) -> None:
        """Remove one that waits; its client keeps its place for the others."""
        sessions = self._processes[item.session.process]
        items = sessions[item.session]
        items.remove(item)
        self._count -= 1
        if not items:
            del sessions[item.session]
        if not sessions:
            del self._processes[item.session.process]
