from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from xditd.daemon.operations.socket_activation import take_listener
from xditd.daemon.sockets.routers import Router
from xditd.ipc.errors import BadRequest


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
        yield Path(folder) / "daemon.sock"


def handed_over(path: Path, kind: int = socket.SOCK_STREAM) -> int:
    """A descriptor as a service manager passes it on."""
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(str(path))
    if kind == socket.SOCK_STREAM:
        listener.listen()
    listener.set_inheritable(True)
    return listener.detach()


def variables(**changes: str) -> dict[str, str]:
    return {"LISTEN_FDS": "1", "LISTEN_PID": "7", "LISTEN_FDNAMES": "xditd.socket", **changes}


def test_listener_serves_zeromq_and_keeps_its_path(path: Path) -> None:
    fd = handed_over(path)
    environ = variables()
    listener = take_listener(environ, 7, path, fd)
    assert listener is not None
    assert listener.fileno() == fd
    assert environ == {}  # a worker must not read them
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)
    context = zmq.Context()
    router = Router(context, path)
    router.listen(listener)
    client = context.socket(zmq.DEALER)
    client.connect(f"ipc://{path}")
    client.send(b"hi")
    assert router.socket.poll(60_000)
    (envelope,) = router.receive()
    assert envelope.peer.endswith(f":{os.getpid()}")
    client.close()
    router.close(0)
    context.term()
    assert path.exists()  # the manager still listens on it


def test_clients_are_told_who_serves_not_who_listened_first(path: Path) -> None:
    fd = handed_over(path)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from xditd.daemon.operations.socket_activation import take_listener as take\n"
        "taken = take({'LISTEN_FDS': '1', 'LISTEN_PID': '7'}, 7, Path(sys.argv[1]), int(sys.argv[2]))\n"
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    word = [sys.executable, "-c", code, str(path), str(fd)]
    with subprocess.Popen(word, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as taker:
        assert taker.stdout is not None
        served_by = int(taker.stdout.readline())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        taker.communicate("")
    os.close(fd)
    assert pid == served_by != os.getpid()


def test_daemon_that_is_not_meant_binds_by_itself(path: Path) -> None:
    assert take_listener(variables(LISTEN_PID="8"), 7, path) is None
    assert take_listener({}, 7, path) is None


def test_several_sockets_are_refused(path: Path) -> None:
    with pytest.raises(BadRequest, match="one ListenStream"):
        take_listener(variables(LISTEN_FDS="2"), 7, path)


def test_socket_of_another_path_is_refused(path: Path) -> None:
    fd = handed_over(path.with_name("other.sock"))
    with pytest.raises(BadRequest, match=r"not a socket that listens on .*daemon.sock"):
        take_listener(variables(), 7, path, fd)


def test_socket_whose_file_was_removed_is_refused(path: Path) -> None:
    fd = handed_over(path)
    path.unlink()
    with pytest.raises(BadRequest, match="restart the socket unit"):
        take_listener(variables(), 7, path, fd)


def test_socket_that_does_not_listen_is_refused(path: Path) -> None:
    fd = handed_over(path, socket.SOCK_DGRAM)
    with pytest.raises(BadRequest, match="not a socket that listens"):
        take_listener(variables(), 7, path, fd)


def test_descriptor_that_is_no_socket_is_refused(path: Path) -> None:
    fd = os.memfd_create("no-socket")
    with pytest.raises(BadRequest, match="start through a socket unit"):
        take_listener(variables(), 7, path, fd)
    os.close(fd)
