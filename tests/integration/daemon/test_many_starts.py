"""Many starts and rebuilds: no process, descriptor or shared memory is left over. All of them with ``-m long``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from process_tree import count_fds, descendants, shared_memory

from xditd.ipc.replies import Generated
from xditd.ipc.status import GroupState

LIKE_OUR_OWN = ["-m", "xditd.gpu_workers"]


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.long)])
def test_starts_and_stops_leave_nothing(count: int, start_daemon: Any, folder: Path) -> None:
    shared, fds = shared_memory(), count_fds(os.getpid())
    left: set[str] = set()
    for number in range(count):
        daemon = start_daemon(worker_flags=LIKE_OUR_OWN, standby="on")
        client = daemon.ready_client()
        pids = descendants(daemon.process.pid)
        assert len(pids) == 3  # the leader and two ranks: a standby comes later
        client.close()
        daemon.clients.clear()
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        if number == 0:
            left = {path.name for path in daemon.runtime.path.iterdir()} - {"fake-starts"}
            fds = count_fds(os.getpid())
    assert {path.name for path in daemon.runtime.path.iterdir()} - {"fake-starts"} == left
    assert shared_memory() == shared
    assert count_fds(os.getpid()) <= fds


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("standby", ["off", "on"])
def test_rebuilt_groups_leave_nothing(
    count: int, standby: str, start_daemon: Any, memory: Any, wait_until: Any
) -> None:
    daemon = start_daemon(worker_flags=LIKE_OUR_OWN, standby=standby)
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    shared = shared_memory()
    expected = 3 + (standby == "on")

    def wait_for_processes() -> list[int]:
        wait_until(lambda: len(descendants(daemon.process.pid)) == expected)
        return descendants(daemon.process.pid)

    fds = 0
    for number in range(count):
        before = wait_for_processes()
        if number == 0:
            fds = count_fds(daemon.process.pid)
        os.kill(client.status().workers[number % 2].pid, signal.SIGKILL)
        starts = number + 2
        client.wait_status(
            lambda status, starts=starts: (
                status.counters.group_starts == starts and status.group_state is GroupState.READY
            )
        )
        client.ask(memory.generate(lent.component_id), Generated)  # a served job: the next restart is not delayed more
        taken = {pid for pid in before if os.path.exists(f"/proc/{pid}")}
        assert len(taken) == (standby == "on")  # the standby became the leader
    wait_for_processes()
    wait_until(lambda: count_fds(daemon.process.pid) <= fds)  # connections of killed ranks close a little later
    assert shared_memory() == shared
