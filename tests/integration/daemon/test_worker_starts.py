"""A worker group that cannot start, with the real leader: status and log name the cause, and no restart follows."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.ipc.status import DaemonStatus, GroupState
from xditd.ipc.worker_messages import STANDBY_BEGINS, STANDBY_FLAG, STANDBY_IMPORTED

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # as in an environment where it is not installed
runpy.run_module("xditd.gpu_workers", run_name="__main__", alter_sys=True)
"""


SLOW_END = """
import sys
from xditd.gpu_workers import __main__ as leader
from xditd.gpu_workers.process import preload
preload.preload = lambda names: names is preload.FOR_STANDBY and print("waits", flush=True)
def parse(arguments):
    print("began with", arguments, flush=True)
    sys.stdin.read()
    raise SystemExit(2)
leader.parse = parse
leader.main()
"""
UNTIL_THE_DAEMON_HAS_ENDED = 'while kill -0 "$PPID" 2>/dev/null; do sleep 0.02; done; exec "$@"'


def given_up(daemon: Any) -> DaemonStatus:
    status = daemon.client().wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert status.counters.group_starts == 1
    assert status.group_detail in daemon.log
    return status


def test_leader_whose_daemon_was_killed_before_it_ran_ends(start_daemon: Any, wait_until: Any) -> None:
    """By then the kernel has given it another parent, whose end it would wait for, with its ranks."""
    ours = [sys.executable, "-m", "xditd.gpu_workers"]
    daemon = start_daemon(command=["sh", "-c", UNTIL_THE_DAEMON_HAS_ENDED, "sh", *ours], device="cpu")
    wait_until(lambda: "leader_pid=" in daemon.log)
    leader = int(re.findall(r"leader_pid=(\d+)", daemon.log)[0])
    daemon.process.kill()
    daemon.wait()
    assert os.path.exists(f"/proc/{leader}")
    try:
        wait_until(lambda: not os.path.exists(f"/proc/{leader}"), deadline_s=20)
    except AssertionError:
        os.killpg(leader, signal.SIGKILL)
        raise


def test_leader_that_waits_is_the_first_to_be_ended_for_memory() -> None:
    """And no longer once it has its flags, here wrong ones; the leaders of working groups are not worth less."""

    def adjustment() -> int:
        return int(Path(f"/proc/{waiting.pid}/oom_score_adj").read_text())

    ours, its = socket.socketpair()
    command = [sys.executable, "-c", SLOW_END, STANDBY_FLAG]
    with ours, subprocess.Popen(command, stdin=its, stdout=subprocess.PIPE, text=True) as waiting:
        its.close()
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waits\n"
        assert ours.recv(64) == STANDBY_IMPORTED
        assert adjustment() == 1000
        ours.sendall(b"[]\n")
        assert waiting.stdout.readline() == "began with []\n"
        assert ours.recv(64) == STANDBY_BEGINS
        assert adjustment() == int(Path("/proc/self/oom_score_adj").read_text())
        ours.shutdown(socket.SHUT_WR)


def test_missing_torch_is_named_and_not_tried_again(start_daemon: Any) -> None:
    status = given_up(start_daemon(command=[sys.executable, "-c", WITHOUT_TORCH]))
    assert "cannot import what workers need" in status.group_detail
    assert "torch" in status.group_detail
    assert "pip install 'xditd[workers]'" in status.group_detail


def test_missing_package_is_named_and_not_tried_again(start_daemon: Any) -> None:
    """An interpreter that does not find the leader's module."""
    status = given_up(start_daemon(command=[sys.executable, "-S", "-I", "-m", "xditd.gpu_workers"]))
    assert "xditd" in status.group_detail


def test_loopback_that_is_down_is_named_and_not_tried_again(start_daemon: Any) -> None:
    alone = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here")
    # Only the leader: a daemon in a user namespace of its own would see its clients as another user's.
    status = given_up(start_daemon(command=[*alone, sys.executable, "-m", "xditd.gpu_workers"]))
    assert "network interface lo: it is down" in status.group_detail
    assert "ip link set lo up" in status.group_detail


@pytest.mark.slow
@pytest.mark.parametrize("limit", [13, pytest.param(40, marks=pytest.mark.long)])
def test_want_of_descriptors_is_named_and_not_tried_again(start_daemon: Any, limit: int) -> None:
    limited = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-m", "xditd.gpu_workers"]
    status = given_up(start_daemon(command=limited, device="cpu", count=2))
    assert f"the hard limit of this process is {limit}" in status.group_detail
    assert "LimitNOFILE=" in status.group_detail


def test_leader_without_memory_for_torch_names_the_limit(start_daemon: Any) -> None:
    """And the daemon serves on: it says so to whoever asks."""
    limited = ["sh", "-c", 'ulimit -v 307200; exec "$@"', "sh", sys.executable, "-m", "xditd.gpu_workers"]
    daemon = start_daemon(command=limited, device="cpu", max_restarts=0)
    status = daemon.client().wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "out of host memory" in status.group_detail
    assert "allowed are 0.29 GiB of addresses for a process (RLIMIT_AS)" in status.group_detail
    assert "MemoryMax=" in status.group_detail


@pytest.fixture
def few_tasks() -> Iterator[Path]:
    """A control group with room for a leader and one process more."""
    parent = Path("/sys/fs/cgroup/pids")
    group = parent / f"xditd-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group may be made here")
    try:
        if not (group / "pids.max").exists():
            pytest.skip("no controller of processes here")
        (group / "pids.max").write_text("2")
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
def test_leader_that_cannot_fork_names_the_limit(start_daemon: Any, few_tasks: Path, wait_until: Any) -> None:
    inside = ["sh", "-c", f'echo $$ > {few_tasks}/cgroup.procs; exec "$@"', "sh", sys.executable]
    daemon = start_daemon(command=[*inside, "-m", "xditd.gpu_workers"], device="cpu", count=2, max_restarts=0)
    status = daemon.client().wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "no process or thread can be started" in status.group_detail
    assert "allowed are" in status.group_detail
    assert "2 for its control group (pids.max)" in status.group_detail
    assert "TasksMax=" in status.group_detail
    wait_until(lambda: not (few_tasks / "cgroup.procs").read_text())


def test_daemon_without_descriptors_for_its_workers_says_so(start_daemon: Any) -> None:
    daemon = start_daemon(before=["sh", "-c", 'ulimit -n 23; exec "$@"', "sh"])
    status = given_up(daemon)
    assert "the hard limit of this process is 23" in status.group_detail


def test_daemon_without_descriptors_for_itself_says_so(start_daemon: Any) -> None:
    daemon = start_daemon(before=["sh", "-c", 'ulimit -n 14; exec "$@"', "sh"])
    assert daemon.wait() == 1
    assert "the hard limit of this process is 14" in daemon.log
    assert "defect" not in daemon.log


@pytest.mark.parametrize("status", [126, 127])
def test_program_that_a_shell_cannot_run_is_not_tried_again(start_daemon: Any, status: int) -> None:
    found = given_up(start_daemon(command=["sh", "-c", f"echo leader: not found >&2; exit {status}", "sh"]))
    assert "leader: not found" in found.group_detail
    assert f"exited with status {status}" in found.group_detail


def test_leader_that_leaves_unasked_is_not_reported_as_a_success(start_daemon: Any) -> None:
    daemon = start_daemon(worker_flags=["--exit-status", "0"], max_restarts=0)
    client = daemon.client()
    status = client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "exited without being told to (exit status 0)" in status.group_detail


def test_leader_that_is_killed_is_reported_by_the_signal(start_daemon: Any) -> None:
    daemon = start_daemon(max_restarts=0)
    client = daemon.ready_client()
    pid = client.status().workers[0].pid
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        leader = int(stat.read().rpartition(")")[2].split()[1])
    os.kill(leader, signal.SIGKILL)
    status = client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert "the group's leader was killed by SIGKILL" in status.group_detail
