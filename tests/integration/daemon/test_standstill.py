"""A daemon that was stopped (SIGSTOP), alone or with its workers and clients, ends no session and no worker."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.ipc.replies import Failed, Generated, StepDone
from xditd.ipc.status import GroupState

DEADLINE_S = 1.5
PAUSE_S = 2.5
"""Longer than the deadline, and than the gap that counts as a standstill."""


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += tree(int(child))
    return found


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def stop_for_a_while(wait_until: Callable[..., None]) -> Iterator[Callable[[list[int]], None]]:
    """Stop processes, and continue them once every deadline would have passed."""
    stopped: list[int] = []

    def stop(pids: list[int]) -> None:
        stopped.extend(pids)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(is_stopped(pid) for pid in pids))
        end = time.monotonic() + PAUSE_S
        wait_until(lambda: time.monotonic() > end)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    yield stop
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("who", [pytest.param("all", marks=pytest.mark.long), "daemon"])
def test_pause_in_mid_job_loses_nothing(
    start_daemon: Any, memory: Any, stop_for_a_while: Callable[[list[int]], None], who: str
) -> None:
    daemon = start_daemon(
        worker_flags=["--step-s", "0.1"], hang_deadline_s=DEADLINE_S, step_deadline_s=DEADLINE_S, max_restarts=0
    )
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=40))
    client.wait_event(running, StepDone)
    stop_for_a_while(tree(daemon.process.pid) if who == "all" else [daemon.process.pid])
    assert isinstance(client.wait(running), Generated)
    assert client.status().counters.group_starts == 1
    assert "stood still for" in daemon.log


@pytest.mark.long
def test_rank_that_hangs_after_a_pause_is_ended_at_its_deadline(
    start_daemon: Any, memory: Any, stop_for_a_while: Callable[[list[int]], None]
) -> None:
    daemon = start_daemon(worker_flags=["--step-s", "0.1"], hang_deadline_s=DEADLINE_S, step_deadline_s=DEADLINE_S)
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=1000))
    client.wait_event(running, StepDone)
    pids = tree(daemon.process.pid)
    rank = client.status().workers[0].pid
    os.kill(rank, signal.SIGSTOP)
    stop_for_a_while([pid for pid in pids if pid != rank])
    began = time.monotonic()
    failed = client.wait(running)
    assert isinstance(failed, Failed)
    assert failed.code == "workers_lost"
    assert "no report for" in failed.detail
    assert time.monotonic() - began > DEADLINE_S / 2  # a new deadline, which is then missed


@pytest.mark.long
def test_pause_while_workers_start_is_not_their_fault(
    start_daemon: Any, stop_for_a_while: Callable[[list[int]], None], wait_until: Callable[..., None]
) -> None:
    daemon = start_daemon(worker_flags=["--never-ready"], start_deadline_s=DEADLINE_S, max_restarts=0)
    client = daemon.client()
    wait_until(lambda: len(tree(daemon.process.pid)) > 1)
    stop_for_a_while(tree(daemon.process.pid))
    began = time.monotonic()
    client.wait_status(lambda status: status.group_state is GroupState.GIVEN_UP)
    assert time.monotonic() - began > DEADLINE_S / 2


def test_pause_while_a_stopping_daemon_lets_a_job_finish(
    start_daemon: Any, memory: Any, stop_for_a_while: Callable[[list[int]], None], wait_until: Callable[..., None]
) -> None:
    daemon = start_daemon("--drain-deadline-s", str(PAUSE_S), worker_flags=["--step-s", "0.1"])
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=15))
    client.wait_event(running, StepDone)
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping: " in daemon.log)
    stop_for_a_while(tree(daemon.process.pid))
    assert isinstance(client.wait(running), Generated)
    assert daemon.wait() == 0


def test_clients_that_stood_still_with_the_daemon_stay(
    start_daemon: Any, start_lender: Any, stop_for_a_while: Callable[[list[int]], None]
) -> None:
    daemon = start_daemon("--client-deadline-s", str(DEADLINE_S))
    daemon.ready_client()
    lender, component_id = start_lender(daemon)
    stop_for_a_while([lender.pid, *tree(daemon.process.pid)])
    status = daemon.client().status()
    assert [component.component_id for component in status.components] == [component_id]
