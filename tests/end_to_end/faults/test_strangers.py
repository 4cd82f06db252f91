"""Other users, and bytes that are no messages: refused with a code, while everybody else is served."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq
from running_daemon import RunningDaemon

from xditd.ipc import limits
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.replies import Failed
from xditd.ipc.requests import GetStatus

NOBODY = 65534
ANSWER_MS = 30_000
"""How long a busy daemon may take to answer."""

KNOCK = """
    import os, sys, zmq
    import xditd.client.jobs.runner  # now: clients import it later, and another user may read no modules
    from pathlib import Path
    from xditd.client import Client, XditdError
    from xditd.ipc.addresses import RuntimeDir, endpoint
    from xditd.ipc.codec import encode, reply_decoder
    from xditd.ipc.protocol import PROTOCOL_VERSION as version
    from xditd.ipc.requests import Hello
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
    try:
        Client(sys.argv[1])
    except XditdError as error:
        print(error.code, error, flush=True)
    peer = zmq.Context().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(endpoint(RuntimeDir(Path(sys.argv[1])).client_socket))
    peer.send(encode(Hello(request_id="h", protocol_version=version, package_version="1", client_name="stranger")))
    print(reply_decoder.decode(peer.recv()).code if peer.poll(int(sys.argv[3])) else "silence", flush=True)
"""


def is_open(folder: Path) -> bool:
    """Whether every user may enter the folder."""
    return all(each.stat().st_mode & 0o001 for each in [folder, *folder.parents])


@pytest.fixture
def open_folder(daemon: RunningDaemon) -> Iterator[Path]:
    """A folder that is open to everybody, with another name of the daemon's socket in it.

    The daemon's own folder does not stay open: the daemon makes it private again within a second, and a session of
    pytest that starts does so with the folder of all sessions.
    """
    private = RuntimeDir(daemon.runtime_dir)
    mode = private.client_socket.stat().st_mode
    folder = Path(tempfile.mkdtemp(prefix="xditd-open-", dir=next(filter(is_open, private.path.parents))))
    try:
        folder.chmod(0o755)
        os.link(private.client_socket, RuntimeDir(folder).client_socket)
        private.client_socket.chmod(0o666)
        yield folder
    finally:
        private.client_socket.chmod(mode)
        shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_is_refused_by_the_folder_and_by_credentials(daemon, open_folder, start_script):
    child = start_script(KNOCK, daemon.runtime_dir, NOBODY, 500)
    assert f"permission denied for uid {NOBODY}" in child.stdout.readline()
    assert child.stdout.readline() == "silence\n"
    child = start_script(KNOCK, open_folder, NOBODY, ANSWER_MS)
    assert "served by uid 0" in child.stdout.readline()
    assert child.stdout.readline() == "not_permitted\n"


HOSTILE = {
    "empty": b"",
    "ten million nils": b"\xdd\x00\x98\x96\x80" + b"\xc0" * (limits.MAX_MESSAGE_BYTES - 5),
    "a full message of empty maps": b"\xdc\x00\x7f" + (b"\xdc\x7f\xff" + b"\x80" * 0x7FFF) * 0x7F,
    "deep": b"\x91" * 100_000,
    "trailing bytes": encode(GetStatus(request_id="x")) + b"x",
    "duplicate key": b"\x82\xa2op\xa4stop\xa2op\xaaget_status",
    "NaN": msgpack.packb({"op": "call", "request_id": "r", "foreseen": {"t": [float("nan")]}}),
    "extension": b"\xd4\x01x",
    "random": random.Random(7).randbytes(65_536),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages(name, daemon, good_job):
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(endpoint(RuntimeDir(daemon.runtime_dir).client_socket))
        peer.send(HOSTILE[name])
        assert peer.poll(ANSWER_MS)
        reply = reply_decoder.decode(peer.recv())
    assert isinstance(reply, Failed)
    assert reply.code == "bad_message"


def test_an_oversize_message(daemon, good_job):
    """ZeroMQ closes the connection at the length, before the bytes are read."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(endpoint(RuntimeDir(daemon.runtime_dir).client_socket))
        peer.send(bytes(limits.MAX_MESSAGE_BYTES + 1))
        assert not peer.poll(500)
        good_job()
