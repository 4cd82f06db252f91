from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xditd.daemon.operations import metrics_server
from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.metrics_server import MAX_CONNECTIONS, MetricsServer, listen_on_loopback
from xditd.daemon.operations.socket_files import listen_at
from xditd.ipc.errors import AlreadyRunning

BIG = "x 1\n" * 2_000_000
"""More than socket buffers hold."""


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
        yield Path(folder) / "metrics.sock"


@pytest.fixture
def serve(path: Path) -> Iterator[Callable[[str], Path]]:
    """Serve a text on a Unix socket, from a loop in another thread."""
    ends: list[Callable[[], None]] = []

    def start(text: str) -> Path:
        loop = EventLoop()
        server = MetricsServer(loop, lambda: text)
        server.listen(listen_at(path))
        read_fd, write_fd = os.pipe()
        loop.watch(read_fd, loop.stop)
        thread = threading.Thread(target=loop.run, args=(lambda: None,))
        thread.start()

        def end() -> None:
            os.write(write_fd, b"x")
            thread.join(30)
            assert not thread.is_alive()
            server.close()
            loop.close()
            os.close(read_fd)
            os.close(write_fd)

        ends.append(end)
        return path

    yield start
    for end in ends:
        end()


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(path))
    return client


def ask(path: Path, request: bytes) -> bytes:
    with connect(path) as client:
        client.sendall(request)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    found = b""
    while part := client.recv(1 << 20):
        found += part
    return found


def test_scrape(serve: Callable[[str], Path]) -> None:
    path = serve("up 1\n")
    assert path.stat().st_mode & 0o777 == 0o600
    head, _, body = ask(path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"HTTP/1.0 200 OK"
    assert b"Content-Length: 5" in head
    assert body == b"up 1\n"
    assert ask(path, b"HEAD /metrics HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /etc/passwd HTTP/1.0\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.0\r\n\r\n", b"405"),
        (b"\x00\xff\r\n\r\n", b"405"),
    ],
)
def test_anything_else_is_refused(serve: Callable[[str], Path], request_bytes: bytes, status: bytes) -> None:
    assert ask(serve("up 1\n"), request_bytes).startswith(b"HTTP/1.0 " + status)


def test_endless_request_is_dropped(serve: Callable[[str], Path]) -> None:
    with connect(serve("up 1\n")) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(b"x" * 4_000_000)


def test_large_answer_arrives_whole(serve: Callable[[str], Path]) -> None:
    assert len(ask(serve(BIG), b"GET /metrics HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2]) == len(BIG)


def test_slow_readers_hold_up_nobody_and_are_dropped(
    serve: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "DEADLINE_S", 2.0)
    path = serve(BIG)
    with connect(path) as slow, connect(path) as silent:
        slow.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        began = time.monotonic()
        ask(path, b"GET /nothing HTTP/1.0\r\n\r\n")
        assert time.monotonic() - began < 2.0
        assert silent.recv(1) == b""  # disconnected at its deadline
        assert len(read_all(slow)) < len(BIG)


def test_connections_are_bounded(serve: Callable[[str], Path]) -> None:
    path = serve("up 1\n")
    clients = [connect(path) for _ in range(MAX_CONNECTIONS)]
    with connect(path) as one_more:
        assert one_more.recv(1) == b""
    for client in clients:
        client.close()


def test_taken_port_is_refused_by_name() -> None:
    loop = EventLoop()
    first = MetricsServer(loop, str)
    first.listen(listen_on_loopback(("127.0.0.1", 0)))
    host, _, port = first.address.removeprefix("http://").removesuffix("/metrics").rpartition(":")
    with pytest.raises(AlreadyRunning, match="--metrics"):
        listen_on_loopback((host, int(port)))
    first.close()
    loop.close()
