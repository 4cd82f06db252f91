"""The leader that waits: it rebuilds a group, and never outlives its daemon."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from xditd.ipc.status import GroupState

LIKE_OUR_OWN = ["-m", "xditd.gpu_workers"]


def rebuilt(starts: int) -> Any:
    return lambda status: status.counters.group_starts == starts and status.group_state is GroupState.READY


def standbys(daemon: Any) -> list[int]:
    return [int(pid) for pid in re.findall(r"standby leader started pid=(\d+)", daemon.log)]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


@pytest.fixture
def daemon(start_daemon: Any, wait_until: Any) -> Any:
    """A daemon with a standby."""
    daemon = start_daemon(worker_flags=LIKE_OUR_OWN, standby="on")
    daemon.ready_client()
    wait_until(lambda: standbys(daemon))
    return daemon


def test_it_rebuilds_the_group_and_is_replaced(daemon: Any, wait_until: Any) -> None:
    client = daemon.ready_client()
    os.kill(client.status().workers[1].pid, signal.SIGKILL)
    status = client.wait_status(rebuilt(2))
    assert {parent(worker.pid) for worker in status.workers} == {standbys(daemon)[0]}
    wait_until(lambda: len(standbys(daemon)) == 2)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert all(is_gone(pid) for pid in standbys(daemon))


def test_without_it_the_group_is_rebuilt_as_before(daemon: Any, wait_until: Any) -> None:
    client = daemon.ready_client()
    os.kill(standbys(daemon)[0], signal.SIGKILL)
    wait_until(lambda: "the standby leader is gone; a rebuilt group has to import again" in daemon.log)
    os.kill(client.status().workers[1].pid, signal.SIGKILL)
    client.wait_status(rebuilt(2))
    wait_until(lambda: len(standbys(daemon)) == 2)


def test_one_that_dies_as_it_is_taken_is_one_failed_start(daemon: Any) -> None:
    client = daemon.ready_client()
    os.kill(standbys(daemon)[0], signal.SIGSTOP)
    ranks = [worker.pid for worker in client.status().workers]
    os.kill(ranks[1], signal.SIGKILL)
    client.wait_status(lambda status: status.group_state is GroupState.STARTING and status.counters.group_starts == 2)
    os.kill(standbys(daemon)[0], signal.SIGKILL)
    starts = client.wait_status(lambda status: status.group_state is GroupState.READY).counters.group_starts
    assert starts == 3 or "does not answer" in daemon.log  # a test that stood still found its deadline missed


def test_one_that_is_stopped_costs_no_start_and_not_the_deadline_of_one(daemon: Any, wait_until: Any) -> None:
    """The group is started without it; by its deadline, 120 s, this test would have failed."""
    client = daemon.ready_client()
    stopped = standbys(daemon)[0]
    wait_until(lambda: "fake standby waits" in daemon.log)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(client.status().workers[1].pid, signal.SIGKILL)
    status = client.wait_status(rebuilt(2))
    assert f"standby leader pid={stopped} does not answer" in daemon.log
    assert stopped not in {parent(worker.pid) for worker in status.workers}
    assert is_gone(stopped)
    wait_until(lambda: len(standbys(daemon)) == 2)


def test_it_ends_with_a_killed_daemon(daemon: Any, wait_until: Any) -> None:
    daemon.process.kill()
    wait_until(lambda: is_gone(standbys(daemon)[0]))
