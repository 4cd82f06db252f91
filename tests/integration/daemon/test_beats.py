"""Heartbeats: sessions of silent clients are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

from xditd.ipc.replies import Farewell, Generated
from xditd.ipc.requests import Goodbye

BEATING_CLIENT = """
import sys, time
from pathlib import Path
from xditd.client.connection import Connection
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import SessionLost
from xditd.ipc.replies import Status
from xditd.ipc.requests import GetStatus
connection = Connection(RuntimeDir(Path(sys.argv[1])), client_name="beating")
print("up", flush=True)
sys.stdin.readline()
end = time.monotonic() + 10
try:
    while time.monotonic() < end:
        connection.ask(GetStatus(request_id=connection.next_request_id()), Status)
        if sys.argv[2] == "alive":
            print("served", flush=True)
            break
    else:
        print("served all along", flush=True)
except SessionLost as error:
    print("lost", connection.is_lost or connection.wait_lost(60), error.detail, flush=True)
"""


def start_beating(daemon: Any, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BEATING_CLIENT, str(daemon.runtime.path), mode]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "up\n"
    return client


def watch_beating(daemon: Any, mode: str) -> tuple[Any, subprocess.Popen[str]]:
    """A client that beats, and one that asks. The second does not beat, and starting the first may take longer than a
    silent client is kept: so it comes last, and who waited for the daemon is gone by then."""
    waiting = daemon.client()
    waiting.ask(Goodbye(request_id=""), Farewell)
    beating = start_beating(daemon, mode)
    return daemon.client(), beating


def finish(client: subprocess.Popen[str]) -> str:
    out, _ = client.communicate("go\n", timeout=60)
    return out


def test_silent_client_loses_its_loan_and_the_log_says_so(start_daemon: Any, memory: Any, start_lender: Any) -> None:
    daemon = start_daemon("--client-deadline-s", "1.5")
    daemon.ready_client()
    lender, component_id = start_lender(daemon, "--runs")
    client = daemon.client()  # it does not beat, and starting the lender may take longer than a silent client is kept
    os.kill(lender.pid, signal.SIGSTOP)
    client.wait_status(lambda status: status.components == () and status.jobs == ())
    failed = client.fail(memory.generate(component_id))
    assert failed.code == "lease_lost"
    assert "no sign of life for" in failed.detail
    assert "client_deadline_s 1.5" in daemon.log
    assert [worker.loaded for worker in client.status().workers] == [0, 0]
    # The test's own client sends requests, which count as heartbeats.
    client.ask(memory.generate(client.lend(memory.manifest()).component_id), Generated)


def test_client_that_only_waits_stays(start_daemon: Any) -> None:
    daemon = start_daemon("--client-deadline-s", "1.5")
    watcher, beating = watch_beating(daemon, "alive")
    began_s = watcher.status().uptime_s
    watcher.wait_status(lambda status: status.uptime_s > began_s + 4.0)
    assert watcher.status().clients == 2
    assert finish(beating) == "served\n"


def test_stopped_client_is_told_when_it_goes_on(start_daemon: Any) -> None:
    daemon = start_daemon("--client-deadline-s", "1.5")
    watcher, beating = watch_beating(daemon, "stopped")
    assert watcher.status().clients == 2
    os.kill(beating.pid, signal.SIGSTOP)
    watcher.wait_status(lambda status: status.clients == 1)
    os.kill(beating.pid, signal.SIGCONT)
    said = finish(beating)
    assert said.startswith("lost True")
    assert "the session was closed" in said


def test_stopped_daemon_blames_nobody(start_daemon: Any) -> None:
    daemon = start_daemon("--client-deadline-s", "1.5")
    watcher, beating = watch_beating(daemon, "alive")
    daemon.process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it waits, and beats into a socket that nobody reads
        beating.wait(3.5)
    daemon.process.send_signal(signal.SIGCONT)
    began_s = watcher.status().uptime_s
    status = watcher.wait_status(lambda status: status.uptime_s > began_s + 1.5)
    assert status.clients == 2
    assert finish(beating) == "served\n"
