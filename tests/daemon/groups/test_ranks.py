"""The reader of the workers' socket passes each report to the group of its token."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from xditd.daemon.groups.ranks import ReportReader
from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.socket_files import listen_at
from xditd.daemon.sockets.routers import Router
from xditd.ipc.codec import encode
from xditd.ipc.errors import BadMessage, XditdError
from xditd.ipc.worker_messages import RankFailed, Report


class Group:
    """Records reports; refuses those of rank 9."""

    def __init__(self) -> None:
        self.routes: set[bytes] = set()
        self.reports: list[Report] = []
        self.ended: list[str] = []

    def has_route(self, routing_id: bytes) -> bool:
        return routing_id in self.routes

    def take_report(self, routing_id: bytes, report: Report) -> None:
        self.routes.add(routing_id)
        if report.rank == 9:
            raise BadMessage("rank 9 is not in this group")
        self.reports.append(report)

    def end(self, error: XditdError) -> None:
        self.ended.append(error.detail)


def report(token: str, rank: int = 0) -> bytes:
    return encode(RankFailed(group_token=token, rank=rank, op_number=1, code="internal", detail="x", is_fatal=False))


class Place:
    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = Router(self.context, folder / "w")
        self.router.listen(listen_at(folder / "w"))
        self.loop = EventLoop()
        self.reader = ReportReader(self.loop, self.router)
        self.one, self.two = Group(), Group()
        self.reader.receivers |= {"token-of-one": self.one, "token-of-two": self.two}
        self.address = f"ipc://{folder}/w"

    def rank(self) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.connect(self.address)
        return socket

    def read(self) -> None:
        """Run the loop until the sent messages have been read."""
        self.loop.call_later(10.0, self.loop.stop)  # the deadline
        self.loop.run(self.loop.stop)


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
        place = Place(Path(folder))
        yield place
        place.context.destroy(linger=0)
        place.loop.close()


def test_each_group_hears_its_own_ranks(place: Place) -> None:
    rank = place.rank()
    for token in ("token-of-one", "token-of-two", "token-of-an-earlier-life"):
        rank.send(report(token))
        place.read()
    assert [found.group_token for found in place.one.reports] == ["token-of-one"]
    assert [found.group_token for found in place.two.reports] == ["token-of-two"]
    assert place.one.ended == place.two.ended == []


def test_a_rank_out_of_step_ends_its_own_group(place: Place) -> None:
    for token, group in (("token-of-one", place.one), ("token-of-two", place.two)):
        rank = place.rank()
        rank.send(report(token))
        place.read()
        rank.send(report(token, rank=9))
        place.read()
        assert group.ended == ["unexpected report of a rank: rank 9 is not in this group"]
    place.rank().send(b"\xc1")  # of no group
    place.read()
    assert len(place.one.ended) == len(place.two.ended) == 1


def test_a_stranger_is_ignored(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        place.rank().send(b"\xc1")
        place.read()
    assert "ignored a message on the workers' socket" in caplog.text
    assert place.one.ended == place.two.ended == []
