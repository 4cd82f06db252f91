"""A hundred clients at once: they take turns, and requests beyond a quota fail with a typed error."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import msgspec
import pytest
import zmq

from xditd import __version__
from xditd.ipc.addresses import endpoint
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.replies import Called, Failed, Queued, Welcome
from xditd.ipc.requests import CheckMemory, Hello, Lend

CLIENTS = 100
JOBS = 4
GREEDY_JOBS = 60
DEADLINE_S = 60.0


def call(memory: Any, component_id: str, request_id: str) -> bytes:
    return encode(msgspec.structs.replace(memory.call(component_id, None), request_id=request_id))


def test_hundred_clients_are_served_in_turns(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon("--client-queue-limit", "1000", worker_flags=["--step-s", "0.002"])
    owner = daemon.ready_client()
    component_id = owner.lend(memory.manifest()).component_id
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(CLIENTS + 1)]
    hello = encode(
        Hello(request_id="h", protocol_version=PROTOCOL_VERSION, package_version=__version__, client_name="test")
    )
    for socket in sockets:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint(daemon.runtime.client_socket))
        socket.send(hello)
        assert isinstance(reply_decoder.decode(socket.recv()), Welcome)
    greedy, *others = sockets
    for number in range(GREEDY_JOBS):
        greedy.send(call(memory, component_id, f"j{number}"))
    began_s = time.monotonic()
    for number in range(JOBS):
        for socket in others:
            socket.send(call(memory, component_id, f"j{number}"))
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    served: Counter[Any] = Counter()
    waited_s: Counter[Any] = Counter()
    last_s: dict[Any, float] = {}
    while served.total() < CLIENTS * JOBS + GREEDY_JOBS:
        ready = poller.poll((began_s + DEADLINE_S - time.monotonic()) * 1000)
        assert ready, f"{served.total()} jobs were served"
        for socket, _ in ready:
            reply = reply_decoder.decode(socket.recv())
            if isinstance(reply, Queued):
                continue
            assert isinstance(reply, Called), reply
            served[socket] += 1
            last_s[socket] = time.monotonic() - began_s
            waited_s[socket] += last_s[socket]
    assert all(served[socket] == JOBS for socket in others)
    waits = [waited_s[socket] for socket in others]
    assert max(waits) <= 2 * min(waits), (min(waits), max(waits))
    # Sixty earlier jobs of one client did not delay the others by sixty jobs: clients took turns.
    assert last_s[greedy] >= max(last_s[socket] for socket in others)
    for socket in sockets:
        socket.close()
    context.term()


def test_busy_says_when_to_come_back(client: Any, memory: Any) -> None:
    component_id = client.lend(memory.manifest()).component_id
    sent = [client.send(memory.generate(component_id, steps=1)) for _ in range(12)]
    ends = [client.wait(request_id) for request_id in sent]
    refused = [end for end in ends if isinstance(end, Failed)]
    assert refused
    assert {end.code for end in refused} == {"busy"}
    assert all(0 < end.retry_after_s <= 60 for end in refused)


@pytest.mark.parametrize(
    ("flag", "value", "detail"),
    [
        ("--client-loan-limit", "1", "client_loan_limit 1"),
        ("--client-lent-bytes", "100", "client_lent_bytes 100"),
        ("--client-io-bytes", "4095", "client_io_bytes"),
        ("--message-bytes", "4096", "message_bytes"),
    ],
)
def test_limits_of_one_client_are_typed_refusals(
    start_daemon: Any, memory: Any, flag: str, value: str, detail: str
) -> None:
    client = start_daemon(flag, value).ready_client()
    first = client.lend(memory.manifest())
    if flag == "--client-io-bytes":
        failed = client.fail(CheckMemory(request_id="", io=memory.block, offset_bytes=0, length_bytes=8))
        assert client.fail(memory.generate(first.component_id)).code == "limit_exceeded"
    elif flag == "--message-bytes":
        client.socket.send(bytes(5000))
        failed = client.wait("?")
    else:
        failed = client.fail(Lend(request_id="", manifest=memory.manifest(generation=0, kind="vae")))
        assert client.lend(memory.manifest()).is_reused  # lending the same bytes again does not count
    assert failed.code == "limit_exceeded"
    assert detail in failed.detail
    assert [component.component_id for component in client.status().components] == [first.component_id]
