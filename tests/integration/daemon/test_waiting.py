"""Waiting for a daemon that starts, by the library and by the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xditd.client import Client, DeadlineExceeded, WorkersUnavailable
from xditd.ipc.status import GroupState


def wait_verb(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from xditd.client.cli.main import main; sys.exit(main())", "wait"]
    return subprocess.Popen(
        [*command, "--runtime-dir", str(folder / "run"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_client_made_beside_the_daemon_waits_for_its_workers(start_daemon: Any) -> None:
    daemon = start_daemon()
    with Client(daemon.runtime.path, wait_s=60) as client:
        assert client.status().group_state is GroupState.READY


def test_client_does_not_wait_for_workers_that_are_given_up(start_daemon: Any) -> None:
    daemon = start_daemon(worker_flags=["--exit-status", "2"])
    with pytest.raises(WorkersUnavailable, match="attention backend warp"):
        Client(daemon.runtime.path, wait_s=60)


def test_client_says_what_it_waited_for(start_daemon: Any) -> None:
    daemon = start_daemon(worker_flags=["--never-ready"])
    daemon.client()
    with pytest.raises(DeadlineExceeded, match=r"^workers are starting; not ready within 0.5 s"):
        Client(daemon.runtime.path, wait_s=0.5)


def test_verb_waits_for_a_daemon_that_comes_later(folder: Path, start_daemon: Any) -> None:
    waiting = wait_verb(folder, "--json")
    assert waiting.stderr is not None
    first = waiting.stderr.readline()  # it waits already, and no daemon runs
    assert "no such socket" in first
    daemon = start_daemon()
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err
    assert json.loads(out) == {"pid": daemon.process.pid, "group_state": "ready", "workers": 2}


def test_verb_outlives_a_daemon_that_ends_while_it_waits(folder: Path, start_daemon: Any) -> None:
    daemon = start_daemon(worker_flags=["--never-ready"])
    daemon.client()
    waiting = wait_verb(folder)
    assert waiting.stderr is not None
    while "workers are starting" not in waiting.stderr.readline():
        pass
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    start_daemon()
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err
    assert "workers ready" in out
