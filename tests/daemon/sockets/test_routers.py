from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from xditd.daemon.operations.socket_files import listen_at
from xditd.daemon.sockets.routers import BATCH, Delivery, Envelope, Router


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
        yield Path(folder) / "s"


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def listening(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> Router:
    router = Router(context, path)
    router.listen(listen_at(path))
    return router


def receive(router: Router, count: int) -> list[Envelope]:
    found: list[Envelope] = []
    while len(found) < count:
        assert router.socket.poll(60_000)
        found += router.receive()
    return found


def test_sender_is_named_by_the_kernel(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
    router = listening(context, path)
    client = context.socket(zmq.DEALER)
    client.connect(f"ipc://{path}")
    client.send(b"hi")
    (envelope,) = receive(router, 1)
    assert envelope.peer == f"localhost:{os.getuid()}:{os.getgid()}:{os.getpid()}"
    assert bytes(envelope.payload or b"") == b"hi"
    assert router.send(envelope.routing_id, b"answer") is Delivery.SENT
    assert client.recv() == b"answer"
    client.send_multipart([b"two", b"frames"])
    assert receive(router, 1)[0].payload is None


def test_one_turn_is_bounded(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
    router = listening(context, path)
    clients = [context.socket(zmq.DEALER) for _ in range(4)]
    for client in clients:
        client.connect(f"ipc://{path}")
        for _ in range(BATCH):
            client.send(b"x")
    longest = total = 0
    while total < 4 * BATCH:
        assert router.socket.poll(60_000)
        taken = len(list(router.receive()))
        longest, total = max(longest, taken), total + taken
    assert longest <= BATCH


def test_nobody_and_a_peer_that_does_not_read(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
    router = listening(context, path)
    assert router.send(b"nobody", b"x") is Delivery.GONE
    client = context.socket(zmq.DEALER)
    client.setsockopt(zmq.RCVHWM, 1)
    client.connect(f"ipc://{path}")
    client.send(b"hi")
    routing_id = receive(router, 1)[0].routing_id
    deliveries = {router.send(routing_id, bytes(64 * 1024)) for _ in range(2_000)}
    assert deliveries == {Delivery.SENT, Delivery.NO_ROOM}


def test_a_removed_socket_is_made_again_and_connections_stay(
    context: zmq.Context[zmq.Socket[bytes]], path: Path
) -> None:
    router = listening(context, path)
    clients = []
    for number in range(3):
        client = context.socket(zmq.DEALER)
        client.connect(f"ipc://{path}")
        clients.append(client)
        client.send(b"%d" % number)
        receive(router, 1)
        path.unlink()
        router.listen(listen_at(path))
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
    for envelope in receive(router, 3):
        assert router.send(envelope.routing_id, envelope.payload or b"") is Delivery.SENT
    assert [client.recv() for client in clients] == [b"0", b"1", b"2"]


def test_zeromq_removes_no_file_when_it_closes(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
    router = listening(context, path)
    path.unlink()
    path.write_text("somebody else's")
    router.close(0)
    context.term()
    assert path.read_text() == "somebody else's"
