from __future__ import annotations

from dataclasses import dataclass

from xditd.daemon.queue.fair_queue import Turns
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.processes import ProcessIdentity


def session(pid: int) -> Session:
    return Session(b"", "", ProcessIdentity(pid=pid, start_ticks=0), -1, "test")


@dataclass(eq=False)
class Item:
    session: Session
    name: str


def names(turns: Turns[Item]) -> str:
    found = []
    while (item := turns.take()) is not None:
        found.append(item.name)
    return " ".join(found)


def fill(*rows: tuple[Session, str]) -> Turns[Item]:
    turns: Turns[Item] = Turns()
    for owner, text in rows:
        for name in text.split():
            turns.add(Item(owner, name))
    return turns


def test_clients_take_turns_and_each_is_served_in_order() -> None:
    rows = ((session(1), "a1 a2 a3 a4"), (session(2), "b1"), (session(3), "c1 c2"))
    assert [item.name for item in fill(*rows)] == ["a1", "b1", "c1", "a2", "c2", "a3", "a4"]
    assert names(fill(*rows)) == "a1 b1 c1 a2 c2 a3 a4"


def test_connections_of_one_process_share_its_turn() -> None:
    turns = fill((session(1), "a1 a2"), (session(1), "A1 A2"), (session(2), "b1 b2 b3"))
    assert turns.clients == 2
    assert names(turns) == "a1 b1 A1 b2 a2 b3 A2"


def test_late_comer_does_not_wait_for_what_others_have_queued() -> None:
    turns = fill((session(1), "a1 a2 a3"))
    first = turns.take()
    assert first is not None
    turns.add(Item(session(2), "b1"))
    assert names(turns) == "a2 b1 a3"


def test_removed_item_leaves_the_place_of_its_client() -> None:
    one, two = session(1), session(2)
    turns = fill((one, "a1 a2"), (two, "b1"))
    turns.remove(next(iter(turns)))
    assert len(turns) == 2
    assert [item.name for item in turns.of_process(one.process)] == ["a2"]
    turns.remove(next(item for item in turns if item.name == "b1"))
    assert turns.clients == 1
    assert names(turns) == "a2"
    assert turns.clients == len(turns) == 0
