"""Replies are sent together and in their order, and unreachable clients are noted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.socket_files import listen_at
from xditd.daemon.sockets import routers
from xditd.daemon.sockets.credentials import parse_credentials
from xditd.daemon.sockets.routers import ReplySender, Router
from xditd.daemon.sockets.sessions import Session, Sessions
from xditd.ipc.codec import reply_decoder
from xditd.ipc.replies import Farewell, LogLines


class Place:
    """A sender with one client that has a session."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = Router(self.context, folder / "s")
        self.router.listen(listen_at(folder / "s"))
        self.loop = EventLoop()
        self.sessions = Sessions(self.loop)
        self.sender = ReplySender(self.router, self.sessions)
        self.client = self.context.socket(zmq.DEALER)
        self.client.connect(f"ipc://{folder}/s")
        self.client.send(b"hi")
        assert self.router.socket.poll(60_000)
        (envelope,) = self.router.receive()
        self.session = self.sessions.open(envelope.routing_id, envelope.peer, parse_credentials(envelope.peer), "test")

    def received(self) -> list[str]:
        found = []
        while self.client.poll(200):
            found.append(reply_decoder.decode(self.client.recv()).request_id)
        return found

    def close(self) -> None:
        self.sessions.close(self.session)
        self.sender.close(0)
        self.context.destroy(linger=0)
        self.loop.close()


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
        place = Place(Path(folder))
        yield place
        place.close()


@pytest.fixture
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine must not change when replies are sent."""
    monkeypatch.setattr(routers, "MAX_UNSENT_S", 60.0)


@pytest.mark.usefixtures("no_hurry")
def test_replies_leave_in_their_order_at_the_end_of_the_round(place: Place) -> None:
    place.sender.reply(place.session, Farewell(request_id="1"))
    place.sender.answer(place.session.routing_id, Farewell(request_id="2"))
    place.sender.send_last(place.session.routing_id, Farewell(request_id="3"))
    assert place.received() == []
    place.sender.flush()
    assert place.received() == ["1", "2", "3"]
    place.sender.flush()
    assert place.received() == []


@pytest.mark.usefixtures("no_hurry")
def test_a_long_round_does_not_keep_them_all(place: Place) -> None:
    for number in range(routers.MAX_UNSENT + 1):
        place.sender.reply(place.session, Farewell(request_id=str(number)))
    assert place.received() == [str(number) for number in range(routers.MAX_UNSENT)]
    place.sender.flush()
    long = LogLines(request_id="long", lines=tuple("x" * 4000 for _ in range(100)), next_line=100)
    assert len(long.lines) * 4000 > routers.MAX_UNSENT_BYTES
    place.sender.reply(place.session, long)
    assert place.received() == [str(routers.MAX_UNSENT), "long"]


def test_a_slow_round_does_not_keep_them_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "MAX_UNSENT_S", 0.0)
    place.sender.reply(place.session, Farewell(request_id="1"))
    assert place.received() == ["1"]


def test_who_cannot_be_reached_is_noted_and_gets_nothing_more(place: Place) -> None:
    peer = parse_credentials(f"localhost:{os.getuid()}:{os.getgid()}:{os.getpid()}")
    gone: Session = place.sessions.open(b"gone", place.session.address, peer, "gone")
    place.sender.reply(gone, Farewell(request_id="1"))
    place.sender.send_last(b"nobody", Farewell(request_id="2"))
    place.sender.reply(place.session, Farewell(request_id="3"))
    place.sender.flush()
    assert place.sender.unreachable == {b"gone": "its connection is closed"}
    place.sender.reply(gone, Farewell(request_id="4"))
    place.sender.flush()
    assert place.received() == ["3"]
    place.sessions.close(gone)


def test_what_waits_leaves_when_the_front_closes(place: Place) -> None:
    place.sender.reply(place.session, Farewell(request_id="last"))
    place.sender.close(1_000)
    assert place.received() == ["last"]
