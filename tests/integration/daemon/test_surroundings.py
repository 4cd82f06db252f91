"""A daemon with unusual inherited state: signals, closed streams, a current folder with modules that is removed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from xditd.client import Client
from xditd.ipc.replies import Farewell, LogLines
from xditd.ipc.requests import GetLogs, Goodbye
from xditd.ipc.status import GroupState

FAKE_WORKERS = Path(__file__).resolve().parent.parent / "fake_workers.py"
FOREIGN = ("queue", "socket", "logging", "json", "zmq", "xditd", "sitecustomize")

SPOIL = """
import os, signal, sys
for name in sys.argv[1].split(","):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[2], sys.argv[2:])
"""


def spoilt(ignored: str) -> list[str]:
    return [sys.executable, "-c", SPOIL, ignored]


def test_blocked_signals_still_stop_the_daemon(start_daemon: Any) -> None:
    daemon = start_daemon(before=spoilt("SIGTERM,SIGCHLD"))
    daemon.ready_client()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0


def test_exit_statuses_are_not_lost_where_a_parent_ignores_sigchld(start_daemon: Any) -> None:
    daemon = start_daemon(before=spoilt("SIGCHLD"), worker_flags=["--exit-status", "2"])
    status = daemon.client().wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "attention backend warp: not installed; use auto" in status.group_detail
    assert status.counters.group_starts == 1  # what status 2 means


def test_a_hangup_does_not_stop_a_daemon_under_nohup(start_daemon: Any) -> None:
    daemon = start_daemon(before=spoilt("SIGHUP"))
    client = daemon.ready_client()
    daemon.process.send_signal(signal.SIGHUP)
    assert client.status().pid == daemon.process.pid
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "SIGHUP" not in daemon.log


def test_closed_streams(start_daemon: Any) -> None:
    daemon = start_daemon(before=["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"])
    client = daemon.ready_client()
    assert any("workers ready" in line for line in client.ask(GetLogs(request_id=""), LogLines).lines)
    streams = [os.readlink(f"/proc/{daemon.process.pid}/fd/{number}") for number in range(3)]
    assert streams == ["/dev/null"] * 3
    os.kill(client.status().workers[0].pid, signal.SIGKILL)  # a rebuild logs more
    client.wait_status(lambda status: status.counters.group_starts == 2 and status.group_state is GroupState.READY)


def test_a_log_that_cannot_be_written(start_daemon: Any) -> None:
    daemon = start_daemon(before=["sh", "-c", 'exec "$@" 2>/dev/full', "sh"])
    client = daemon.ready_client()
    assert any("workers ready" in line for line in client.ask(GetLogs(request_id=""), LogLines).lines)


def test_a_log_that_nobody_reads(start_daemon: Any, folder: Path) -> None:
    """A stopped pager behind a pipe of one page, which a hundred lines fill."""
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    daemon = start_daemon("--log-level", "debug", before=["sh", "-c", f'exec "$@" 2>{folder}/pipe', "sh"])
    clients = [daemon.ready_client() for _ in range(50)]
    for client in clients:
        client.ask(Goodbye(request_id=""), Farewell)
    assert daemon.client().status().pid == daemon.process.pid
    os.set_blocking(reader, True)
    with open(reader, encoding="utf-8") as pager:
        assert "daemon" in pager.readline()
        daemon.process.send_signal(signal.SIGTERM)
        assert any("lines were dropped" in line for line in pager)
    assert daemon.wait() == 0


def test_the_folder_in_which_the_daemon_was_started(folder: Path, wait_until: Any) -> None:
    """Relative paths count from it, and nothing else: foreign modules in it are not imported, and it may be removed."""
    here = folder / "here"
    here.mkdir()
    for name in FOREIGN:
        (here / f"{name}.py").write_text(f"raise SystemExit('foreign {name}')\n")
    command = json.dumps([sys.executable, str(FAKE_WORKERS)])
    (here / "my.toml").write_text(f'[daemon]\nruntime_dir = "../run"\n[workers]\ncommand = {command}\n')
    word = [Path(sys.executable).with_name("xditd"), "serve", "--config", "my.toml"]
    with (folder / "log").open("wb") as log, subprocess.Popen(word, cwd=here, stderr=log) as daemon:
        wait_until((folder / "run" / "daemon.sock").exists)
        with Client(folder / "run") as client:
            wait_until(lambda: client.status().group_state is GroupState.READY)
            pids = [daemon.pid, *(worker.pid for worker in client.status().workers)]
            assert {os.readlink(f"/proc/{pid}/cwd") for pid in pids} == {"/"}
            shutil.rmtree(here)
            os.kill(pids[1], signal.SIGKILL)
            wait_until(lambda: client.status().counters.group_starts == 2)
            wait_until(lambda: client.status().group_state is GroupState.READY)
        daemon.terminate()
        assert daemon.wait(20) == 0
    assert not here.exists()
    assert "foreign" not in (folder / "log").read_text()


def test_a_daemon_that_is_started_in_a_removed_folder(start_daemon: Any, folder: Path) -> None:
    (folder / "gone").mkdir()
    daemon = start_daemon(before=["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(folder / "gone")])
    assert daemon.ready_client().status().pid == daemon.process.pid


def test_a_relative_path_in_a_removed_folder(folder: Path) -> None:
    (folder / "gone").mkdir()
    shell = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    word = ["sh", "-c", shell, "sh", str(folder / "gone"), sys.executable, "-P", "-m", "xditd.daemon"]
    done = subprocess.run([*word, "--runtime-dir", "run"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "xditd serve: path run: relative to the current folder, which was removed; use an absolute path\n"
    )
