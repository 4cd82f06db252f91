"""Finding the daemon: each reason for its absence has its own error, at once."""

import os
import socket
import subprocess
import sys
import time

import pytest

from xditd.client import discovery
from xditd.client.discovery import ACTIVATION_DEADLINE_S, find_daemon
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import BadRequest, DaemonUnreachable


def test_names_the_missing_socket_at_once(folder):
    started = time.monotonic()
    with pytest.raises(DaemonUnreachable, match=rf"{folder}/daemon.sock: no such socket.*xditd serve"):
        find_daemon(RuntimeDir(folder))
    assert time.monotonic() - started < ACTIVATION_DEADLINE_S


def test_a_socket_of_a_dead_daemon_is_named(folder):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "daemon.sock"))
    with pytest.raises(DaemonUnreachable, match=r"connection refused; the daemon that made it has exited"):
        find_daemon(RuntimeDir(folder))


def test_finds_the_listening_process(folder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "daemon.sock"))
        listener.listen()
        found = find_daemon(RuntimeDir(folder))
        os.close(found.pidfd)
    assert found.pid == os.getpid()


def test_refuses_a_path_too_long_for_a_socket_address(folder):
    with pytest.raises(BadRequest, match="at most 107 fit"):
        find_daemon(RuntimeDir(folder / ("x" * 120)))


LISTENER = """
import socket, sys, time
open("/proc/self/comm", "w").write("systemd")
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def manager(folder):
    """A process called systemd that listens on the daemon's socket."""
    word = [sys.executable, "-c", LISTENER, str(folder / "daemon.sock")]
    with subprocess.Popen(word, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        yield process
        process.communicate("")


def test_waits_while_systemd_listens_and_names_the_journal(folder, manager, monkeypatch):
    monkeypatch.setattr(discovery, "ACTIVATION_DEADLINE_S", 0.5)
    started = time.monotonic()
    with pytest.raises(DaemonUnreachable, match=r"no daemon took over within .* journalctl"):
        find_daemon(RuntimeDir(folder))
    assert 0.5 <= time.monotonic() - started < ACTIVATION_DEADLINE_S
