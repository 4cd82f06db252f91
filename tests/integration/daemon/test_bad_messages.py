"""Malformed messages are answered with a typed error if possible, and the next client is served."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zmq

from xditd.ipc import limits
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.replies import Lent
from xditd.ipc.requests import GetStatus, Lend
from xditd.ipc.tensors import TensorSpec

GARBAGE = {
    "empty": b"",
    "random": random.Random(7).randbytes(4096),
    "not a map": msgpack.packb([1, 2, 3]),
    "ten million nils": b"\xdd\x00\x98\x96\x80" + b"\xc0" * 10_000,
    "deep": b"\x91" * 5_000,
    "trailing bytes": encode(GetStatus(request_id="x")) + b"x",
    "unknown op": msgpack.packb({"op": "format_disk", "request_id": "mine"}),
    "unknown field": msgpack.packb({"op": "get_status", "request_id": "mine", "shell": "sh"}),
    "value out of range": msgpack.packb({"op": "get_logs", "request_id": "mine", "after_line": -1}),
    "duplicate key": b"\x82\xa2op\xa4stop\xa2op\xaaget_status",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_and_the_next_request_served(client: Any, shared_daemon: Any, name: str) -> None:
    stranger = shared_daemon.client(says_hello=False)
    stranger.socket.send(GARBAGE[name])
    failed = stranger.receive()
    assert failed.code == "bad_message"
    # A readable request id is in the answer, so that the client does not wait until its deadline.
    assert failed.request_id == ("mine" if b"mine" in GARBAGE[name] else "?")
    client.status()


def test_several_frames_are_refused(client: Any) -> None:
    client.socket.send_multipart([b"", encode(GetStatus(request_id="x"))])
    assert client.receive().code == "bad_message"
    client.status()


def test_oversize_message_closes_the_connection_alone(client: Any, shared_daemon: Any) -> None:
    context = zmq.Context()
    sender = context.socket(zmq.DEALER)
    sender.setsockopt(zmq.LINGER, 0)
    sender.connect(f"ipc://{shared_daemon.runtime.client_socket}")
    sender.send(bytes(limits.MAX_MESSAGE_BYTES + 1))
    client.status()
    sender.send(b"after it")  # ZeroMQ has reconnected
    assert sender.poll(60_000)
    assert reply_decoder.decode(sender.recv()).code == "bad_message"
    sender.close()
    context.term()
    status = Path(f"/proc/{shared_daemon.process.pid}/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    assert resident_kib < 100 * 1024


def test_garbage_on_the_workers_socket_is_ignored(
    client: Any, shared_daemon: Any, memory: Any, wait_until: Callable[..., None]
) -> None:
    context = zmq.Context()
    intruder = context.socket(zmq.DEALER)
    intruder.connect(f"ipc://{shared_daemon.runtime.worker_socket}")
    intruder.send(os.urandom(100))
    fields = {"op": "rank_failed", "group_token": "wrong-token", "rank": 0, "op_number": 1}
    intruder.send(msgpack.packb({**fields, "code": "internal", "detail": "x", "is_fatal": True}))
    wait_until(lambda: "ignored a message on the workers' socket" in shared_daemon.log)
    client.lend(memory.manifest())
    intruder.close()
    context.term()


def test_a_lend_of_the_largest_size_reaches_the_workers(client: Any, memory: Any) -> None:
    """The command to the workers is larger: it has the manifest, and what the daemon adds."""

    def lend(names: list[str]) -> Lend:
        tensors = tuple(TensorSpec(name, "float32", (4, 4), 0, 0) for name in names)
        return Lend(request_id="largest", manifest=msgspec.structs.replace(memory.manifest(), tensors=tensors))

    names = [f"{number:0300}" for number in range(10_000)]
    each, rest = divmod(limits.MAX_MESSAGE_BYTES - len(encode(lend(names))), len(names))
    largest = lend([name + "x" * (each + (at < rest)) for at, name in enumerate(names)])
    assert len(encode(largest)) == limits.MAX_MESSAGE_BYTES
    starts = client.status().counters.group_starts
    client.socket.send(encode(largest))
    assert isinstance(client.wait("largest"), Lent)
    assert client.status().counters.group_starts == starts
