"""The daemon under a service manager: notify messages, watchdog, reload and socket activation."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.client.client import Client
from xditd.ipc.status import GroupState

FAKE_WORKERS = Path(__file__).resolve().parent.parent / "fake_workers.py"
SOCKET_MANAGER = Path(__file__).resolve().parent / "socket_manager.py"
DEADLINE_S = 60.0


class Manager:
    """A notify socket, and all messages received on it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.heard: list[dict[str, str]] = []

    def wait(self, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Wait for a message that is later than those already returned."""
        end_s = time.monotonic() + DEADLINE_S
        while True:
            self.socket.settimeout(max(0.001, end_s - time.monotonic()))
            try:
                said = dict(line.split("=", 1) for line in self.socket.recv(65536).decode().splitlines())
            except TimeoutError:
                raise AssertionError(f"not said within {DEADLINE_S} s; heard {self.heard}") from None
            self.heard.append(said)
            if condition(said):
                return said

    def is_silent(self, seconds: float) -> bool:
        """Drop waiting messages, then return whether none is received for so long."""
        self.socket.settimeout(0.001)
        while True:
            try:
                self.socket.recv(65536)
            except TimeoutError:
                break
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(65536)
        except TimeoutError:
            return True
        return False


@pytest.fixture
def manager(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager whose variables the next daemon inherits, with a watchdog of 0.4 s."""
    found = Manager(folder / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield found
    found.socket.close()


def says(key: str, words: str = "") -> Callable[[dict[str, str]], bool]:
    return lambda said: words in said.get(key, "\0")


def test_life_as_a_service_manager_hears_it(manager: Manager, start_daemon: Any, memory: Any, fake: Any) -> None:
    daemon = start_daemon()
    ready = manager.wait(says("READY", "1"))
    assert "starting" in ready["STATUS"]
    assert daemon.client().status().pid == daemon.process.pid  # ready means that it answers
    manager.wait(says("STATUS", "2 workers ready"))
    manager.wait(says("WATCHDOG", "1"))
    client = daemon.ready_client()
    os.kill(client.status().workers[0].pid, signal.SIGKILL)
    manager.wait(says("STATUS", "workers lost, to be rebuilt"))
    manager.wait(says("STATUS", "2 workers ready"))
    daemon.process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in manager.wait(says("STOPPING", "1"))["STATUS"]
    assert daemon.wait() == 0


def test_stopped_daemon_does_not_feed_the_watchdog(manager: Manager, start_daemon: Any) -> None:
    daemon = start_daemon()
    manager.wait(says("WATCHDOG", "1"))
    daemon.process.send_signal(signal.SIGSTOP)
    assert manager.is_silent(1.0)
    daemon.process.send_signal(signal.SIGCONT)
    manager.wait(says("WATCHDOG", "1"))


def test_no_process_of_the_group_inherits_the_manager(manager: Manager, start_daemon: Any) -> None:
    daemon = start_daemon()
    pids = [worker.pid for worker in daemon.ready_client().status().workers]
    environs = [Path(f"/proc/{pid}/environ").read_bytes() for pid in pids]
    assert environs
    assert not [found for found in environs if b"NOTIFY_SOCKET" in found or b"WATCHDOG" in found]


def test_reload_applies_what_can_change_and_names_the_rest(manager: Manager, start_daemon: Any, folder: Path) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    assert client.status().queue_limit == 512
    path = folder / "xditd.toml"
    before = path.read_text()
    path.write_text("[daemon]\nqueue_limit = 7\nlog_level = 'debug'\n" + before + "\nhang_deadline_s = 7\n")
    daemon.process.send_signal(signal.SIGHUP)
    assert int(manager.wait(says("RELOADING", "1"))["MONOTONIC_USEC"]) > 0
    status = manager.wait(says("READY", "1"))["STATUS"]
    assert "log_level, queue_limit changed; hang_deadline_s needs a restart" in status
    assert client.status().queue_limit == 7
    path.write_text("[daemon]\nqueue_limit = 'many'\n")
    daemon.process.send_signal(signal.SIGHUP)
    assert "not reloaded" in manager.wait(says("READY", "1"))["STATUS"]
    assert client.status().queue_limit == 7
    assert client.status().group_state is GroupState.READY


def test_hangup_of_a_terminal_stops_a_daemon_without_a_manager(start_daemon: Any) -> None:
    daemon = start_daemon()
    daemon.ready_client()
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.wait() == 0
    assert "signal SIGHUP" in daemon.log


def test_socket_activation(folder: Path) -> None:
    """A client starts the daemon; after its end another client starts the next; the path stays."""
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    (folder / "xditd.toml").write_text(f"[workers]\ncommand = {json.dumps([sys.executable, str(FAKE_WORKERS)])}\n")
    daemon = [
        sys.executable,
        "-m",
        "xditd.daemon",
        "--config",
        str(folder / "xditd.toml"),
        "--runtime-dir",
        str(runtime),
    ]
    word = [sys.executable, str(SOCKET_MANAGER), str(runtime / "daemon.sock"), *daemon]
    with (folder / "log").open("wb") as log:
        manager = subprocess.Popen(word, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "listening\n"
        pids = []
        for _ in range(2):
            with Client(runtime) as client:
                pids.append(client.daemon_pid)
                assert client.status().pid == client.daemon_pid
                assert client.stop()
            assert (runtime / "daemon.sock").exists()
        assert len({*pids, manager.pid}) == 3
    finally:
        manager.terminate()
        assert manager.wait(DEADLINE_S) == 0, (folder / "log").read_text()
        assert manager.stdout is not None
        manager.stdout.close()
