"""Clients that die or fall silent at every moment: their loans and jobs end, and others are served."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from xditd.ipc.addresses import RuntimeDir

MOMENTS = {
    "before lending": """
        import sys
        from xditd.client import Client
        client = Client(sys.argv[1])
        print("now", flush=True)
        sys.stdin.read()
    """,
    "after lending": """
        import sys
        from xditd.client import Client
        client = Client(sys.argv[1])
        loan = client.lend(sys.argv[2])
        print("now", flush=True)
        sys.stdin.read()
    """,
    "in mid-job": """
        import sys, torch
        from xditd.client import Client
        client = Client(sys.argv[1])
        loan = client.lend(sys.argv[2])
        text = {"prompt_embeds": torch.randn(1, 16, 4096), "pooled_prompt_embeds": torch.randn(1, 768)}
        job = client.generate(loan, text, height=128, width=128, steps=1000)
        for event in job:
            print("now", flush=True)
    """,
    "while waiting": """
        import sys, torch
        from xditd.client import Client
        client = Client(sys.argv[1])
        loan = client.lend(sys.argv[2])
        text = {"prompt_embeds": torch.randn(1, 16, 4096), "pooled_prompt_embeds": torch.randn(1, 768)}
        jobs = [client.generate(loan, text, height=128, width=128, steps=1000) for _ in range(3)]
        running = iter(jobs[0])
        next(running)
        print("now", flush=True)
        sys.stdin.read()
    """,
    "in mid-send": """
        import sys, zmq
        from xditd.ipc import limits
        from xditd.ipc.addresses import RuntimeDir, endpoint
        from pathlib import Path
        peer = zmq.Context().socket(zmq.DEALER)
        peer.connect(endpoint(RuntimeDir(Path(sys.argv[1])).client_socket))
        sent = 0
        while True:
            peer.send(b"\\x93" + bytes(limits.MAX_MESSAGE_BYTES - 1))
            sent += 1
            if sent == 3:
                print("now", flush=True)
    """,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_client(moment, daemon, client, files, good_job, start_script, wait_until):
    child = start_script(MOMENTS[moment], daemon.runtime_dir, files.tuned)
    assert child.stdout.readline() == "now\n"
    child.kill()
    child.wait()
    good_job()
    wait_until(lambda: child.pid not in {c.owner_pid for c in client.status().components}, "its loan to end")


def test_half_a_message(daemon, good_job):
    """A greeting of ZeroMQ's protocol, the start of a long frame, and then nothing."""
    path = str(RuntimeDir(daemon.runtime_dir).client_socket)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\x00" + bytes(31)
    ready = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    for sent in (
        b"",
        greeting[:10],
        greeting,
        greeting + ready,
        greeting + ready + b"\x02\x00\x00\x00\x00\x00\x3f\xff\xffabc",
    ):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(path)
            peer.sendall(sent)
            good_job()  # while it is connected


def test_a_stopped_client_holds_nobody(daemon, client, files, good_job, start_script):
    child = start_script(MOMENTS["after lending"], daemon.runtime_dir, files.tuned)
    assert child.stdout.readline() == "now\n"
    os.kill(child.pid, signal.SIGSTOP)
    good_job()
    assert child.pid in {component.owner_pid for component in client.status().components}


def test_a_client_that_stops_reading(daemon, client, good_job, start_script, wait_until):
    child = start_script(
        """
        import sys, zmq
        from pathlib import Path
        from xditd.ipc.addresses import RuntimeDir, endpoint
        from xditd.ipc.codec import encode
        from xditd.ipc.protocol import PROTOCOL_VERSION as version
        from xditd.ipc.requests import GetLogs, Hello
        peer = zmq.Context().socket(zmq.DEALER)
        peer.setsockopt(zmq.RCVHWM, 1)
        peer.connect(endpoint(RuntimeDir(Path(sys.argv[1])).client_socket))
        peer.send(encode(Hello(request_id="h", protocol_version=version, package_version="1", client_name="deaf")))
        peer.recv()
        print("now", flush=True)
        request = encode(GetLogs(request_id="x"))
        while True:
            peer.send(request)
        """,
        daemon.runtime_dir,
    )
    before = client.status().clients
    assert child.stdout.readline() == "now\n"
    wait_until(lambda: "does not read its replies" in daemon.log_text(), "the deaf client to be dropped")
    good_job()
    assert client.status().clients == before
