"""Connections: ``Hello``, several threads, deadlines, and the daemon's exit."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from xditd.client.connection import CONTROL_DEADLINE_S, Connection
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import (
    BadMessage,
    Closed,
    DaemonUnreachable,
    DeadlineExceeded,
    LimitExceeded,
    PeerError,
    ProtocolMismatch,
    Unsupported,
)
from xditd.ipc.replies import Failed, LogLines, Stopping
from xditd.ipc.requests import GetLogs, Hello, Lend, Stop
from xditd.ipc.tensors import ComponentKind, Fingerprint, HostShmBlock, Manifest, TensorSpec

GREETS_THEN_SLEEPS = """
import os, sys, time, zmq
from xditd.ipc.codec import encode, request_decoder
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.replies import Welcome
router = zmq.Context().socket(zmq.ROUTER)
router.bind("ipc://" + sys.argv[1])
print("bound", flush=True)
who, payload = router.recv_multipart()
hello = request_decoder.decode(payload)
router.send_multipart((who, encode(Welcome(request_id=hello.request_id, protocol_version=PROTOCOL_VERSION,
    package_version="0", daemon_pid=os.getpid(), world_size=1))))
time.sleep(60)
"""


@pytest.fixture
def connect(folder):
    made = []

    def make(**options):
        connection = Connection(RuntimeDir(folder), client_name="test", **options)
        made.append(connection)
        return connection

    yield make
    for connection in made:
        connection.close()


def ask_logs(connection, number, deadline_s=5.0):
    request = GetLogs(request_id=connection.next_request_id(), after_line=number)
    return connection.ask(request, LogLines, deadline_s=deadline_s)


def test_hello_has_the_versions(daemon, connect):
    connection = connect()
    assert connection.welcome.daemon_pid == os.getpid()
    assert daemon.wait_for(Hello).client_name == "test"


def test_a_listener_that_does_not_answer_is_no_daemon(folder, connect):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "daemon.sock"))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(DaemonUnreachable, match=r"no daemon answered within 0\.3 s; is it running\?"):
            connect(hello_deadline_s=0.3)
        assert time.monotonic() - started < CONTROL_DEADLINE_S


def test_a_refused_hello_raises_what_the_daemon_meant(daemon, connect):
    daemon.answers[Hello] = lambda request: [
        Failed(request_id=request.request_id, code="protocol_mismatch", detail="client 1, daemon 2")
    ]
    with pytest.raises(ProtocolMismatch, match="client 1, daemon 2"):
        connect()


def test_threads_get_their_own_replies(daemon, connect):
    daemon.answers[GetLogs] = lambda request: [
        LogLines(request_id=request.request_id, lines=(), next_line=request.after_line + 1)
    ]
    connection = connect()
    wrong = []

    def work(base):
        for number in range(base, base + 50):
            if ask_logs(connection, number).next_line != number + 1:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(base * 1000,)) for base in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert wrong == []
    assert len(daemon.requests(GetLogs)) == 400


def test_replies_in_another_order_find_their_requests(daemon, connect):
    connection = connect()
    boxes = [
        connection.submit(GetLogs(request_id=connection.next_request_id(), after_line=number)) for number in range(3)
    ]
    daemon.wait_for(GetLogs, 3)
    for box, number in reversed(list(zip(boxes, range(3), strict=True))):
        daemon.send(LogLines(request_id=box.request_id, lines=(), next_line=number))
    from xditd.client.mailboxes import Timeouts

    assert [box.wait(LogLines, Timeouts(5.0)).next_line for box in boxes] == [0, 1, 2]


def test_a_request_without_answer_ends_at_its_deadline(daemon, connect):
    connection = connect()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"GetLogs: no answer from the daemon for [\d.]+ s"):
        ask_logs(connection, 0, deadline_s=0.2)
    assert time.monotonic() - started < CONTROL_DEADLINE_S


def test_a_late_reply_is_dropped(daemon, connect):
    connection = connect()
    late = GetLogs(request_id=connection.next_request_id())
    with pytest.raises(DeadlineExceeded):
        connection.ask(late, LogLines, deadline_s=0.05)
    daemon.send(LogLines(request_id=late.request_id, lines=(), next_line=1))
    daemon.send(LogLines(request_id="nobody", lines=(), next_line=1))
    daemon.answers[GetLogs] = lambda request: [LogLines(request_id=request.request_id, lines=(), next_line=7)]
    assert ask_logs(connection, 0).next_line == 7


def test_a_reply_of_the_wrong_type_is_the_daemons_fault(daemon, connect):
    daemon.answers[GetLogs] = lambda request: [Stopping(request_id=request.request_id)]
    with pytest.raises(PeerError, match="Stopping instead of LogLines"):
        ask_logs(connect(), 0)


def test_an_invalid_message_from_the_daemon_ends_the_connection(daemon, connect):
    daemon.answers[GetLogs] = lambda request: daemon.send(b"\xc1garbage") or []
    connection = connect()
    with pytest.raises(BadMessage, match="the daemon sent an invalid message"):
        ask_logs(connection, 0)
    assert connection.wait_lost(5.0)
    with pytest.raises(BadMessage):
        ask_logs(connection, 0)


def test_a_wait_ends_when_the_daemon_exits(folder, connect):
    process = subprocess.Popen(
        [sys.executable, "-c", GREETS_THEN_SLEEPS, str(folder / "daemon.sock")], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"bound\n"
        connection = connect(hello_deadline_s=10.0)
        box = connection.submit(Stop(request_id=connection.next_request_id()))
        process.kill()
        killed = time.monotonic()
        from xditd.client.mailboxes import Timeouts

        with pytest.raises(DaemonUnreachable, match=rf"the daemon \(pid {process.pid}\) has exited"):
            box.wait(Stopping, Timeouts(30.0))
        assert time.monotonic() - killed < CONTROL_DEADLINE_S
        with pytest.raises(DaemonUnreachable, match="has exited"):
            ask_logs(connection, 0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_connection_always_ends_when_its_daemon_is_killed_under_a_message(folder):
    """With a reconnect interval of -1, one in ten hung on a busy machine."""

    def outlive_a_daemon(number: int) -> None:
        own = folder / str(number)
        own.mkdir(mode=0o700)
        process = subprocess.Popen(
            [sys.executable, "-c", GREETS_THEN_SLEEPS, str(own / "daemon.sock")], stdout=subprocess.PIPE
        )
        with process.stdout:
            assert process.stdout.readline() == b"bound\n"
            connection = Connection(RuntimeDir(own), client_name="test", hello_deadline_s=10.0)
            connection.submit(Stop(request_id=connection.next_request_id()))
            process.kill()
            process.wait()
            assert connection.wait_lost(10.0)
            connection.close()
            assert not connection._io.thread.is_alive()

    with ThreadPoolExecutor(max_workers=6) as pool:
        list(pool.map(outlive_a_daemon, range(30)))


def test_closing_fails_waiting_requests(daemon, connect):
    connection = connect()
    box = connection.submit(GetLogs(request_id=connection.next_request_id()))
    connection.close()
    from xditd.client.mailboxes import Timeouts

    with pytest.raises(Closed, match="this client is closed"):
        box.wait(LogLines, Timeouts(5.0))


def test_a_dropped_connection_ends_its_thread(daemon, folder, wait_until):
    connection = Connection(RuntimeDir(folder), client_name="dropped")
    thread = connection._io.thread
    del connection
    wait_until(lambda: not thread.is_alive())


def test_a_fork_is_refused(daemon, connect):
    connection = connect()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ask_logs(connection, 0)
            os.write(writer, b"answered")
        except Unsupported as error:
            os.write(writer, error.detail.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert "make a new Client after the fork" in pipe.read()
    os.waitpid(child, 0)
    daemon.answers[GetLogs] = lambda request: [LogLines(request_id=request.request_id, lines=(), next_line=3)]
    assert ask_logs(connection, 0).next_line == 3


def test_a_request_that_is_too_large_is_not_sent(daemon, connect):
    block = HostShmBlock(fd=3, inode=1, size_bytes=8, fingerprint=Fingerprint(length_bytes=0, digest=bytes(16)))
    tensors = tuple(TensorSpec(f"{number:0600d}", "uint8", (8,), 0, 0) for number in range(16_000))
    manifest = Manifest(kind=ComponentKind.VAE, label="huge", blocks=(block,), tensors=tensors)
    connection = connect()
    with pytest.raises(LimitExceeded, match=r"request Lend: \d+ bytes, at most 4194304 are read"):
        connection.submit(Lend(request_id=connection.next_request_id(), manifest=manifest))


ASKS_ONCE = """
import sys
from pathlib import Path
from xditd.client.connection import Connection
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.replies import LogLines
from xditd.ipc.requests import GetLogs
connection = Connection(RuntimeDir(Path(sys.argv[1])), client_name="test", hello_deadline_s=30.0)
request = GetLogs(request_id=connection.next_request_id())
print(connection.ask(request, LogLines, deadline_s=float(sys.argv[2])).lines[0], flush=True)
connection.close()
"""


def test_a_client_that_stood_still_waits_anew(daemon, folder, wait_until):
    """After it was stopped for longer than its deadline, it still waits for the reply and takes it."""
    deadline_s = 2.0
    daemon.answers[GetLogs] = lambda _: []
    client = subprocess.Popen(
        [sys.executable, "-c", ASKS_ONCE, str(folder), str(deadline_s)], stdout=subprocess.PIPE, text=True
    )
    try:
        asked = daemon.wait_for(GetLogs, deadline_s=30.0)
        client.send_signal(signal.SIGSTOP)
        ends = time.monotonic() + deadline_s + 0.5
        wait_until(lambda: time.monotonic() > ends)
        client.send_signal(signal.SIGCONT)
        ends = time.monotonic() + 0.3
        wait_until(lambda: time.monotonic() > ends)
        daemon.send(LogLines(request_id=asked.request_id, lines=("late, and not too late",), next_line=1))
        out, _ = client.communicate(timeout=60)
        assert (out, client.returncode) == ("late, and not too late\n", 0)
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
