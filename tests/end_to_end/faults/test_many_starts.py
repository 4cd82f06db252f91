"""A hundred starts and stops, and fifty rebuilt groups, with and without a standby: nothing is left over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from process_tree import count_fds, shared_memory

from xditd.client import Client
from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.demo.daemon_process import DaemonProcess, descendants
from xditd.client.waiting import wait_for
from xditd.ipc.status import DaemonStatus, GroupState

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(7200)]

STARTS, REBUILDS = 50, 50
WAIT_S = 120.0
MIB = 2**20


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def used_bytes() -> int:
    """Return the bytes of all GPUs that any process uses, this one too; 0 without GPUs."""
    counts = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    return sum(total - free for free, total in counts)


def start(log: Path, standby: str) -> tuple[DaemonProcess, Client]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    daemon = DaemonProcess(log, min(2, torch.cuda.device_count()) or 2, device, ["--standby", standby])
    client = daemon.connect()
    wait_for(client.status, WAIT_S, workers=True, show=lambda _: None)
    return daemon, client


@pytest.fixture
def state() -> Mapping[str, torch.Tensor]:
    return flux1_state_dict(0, double_blocks=1, single_blocks=1)


@pytest.fixture
def rebuilding(tmp_path: Path) -> Iterator[tuple[DaemonProcess, Client]]:
    daemon, client = start(tmp_path / "log", "on")
    yield daemon, client
    client.close()
    daemon.stop(None)


def run(client: Client, component_id: str) -> torch.Tensor:
    inputs = {
        "prompt_embeds": torch.zeros(1, 16, 4096),
        "pooled_prompt_embeds": torch.zeros(1, 768),
    }
    return client.generate(component_id, inputs, height=64, width=64, steps=1, seed=0).result().latents


@pytest.mark.parametrize("fifty", ["first", "second"])  # each ends within ten minutes on any host
def test_starts_and_stops_leave_nothing(tmp_path: Path, state: Mapping[str, torch.Tensor], fifty: str) -> None:
    """Every tenth start runs a job; of the others some are stopped while ranks still import."""
    shared, used, fds = shared_memory(), used_bytes(), 0
    first: torch.Tensor | None = None
    for number in range(STARTS):
        daemon, client = start(tmp_path / "log", "on" if number % 5 == 0 else "off")
        if number % 10 == 0:
            with client.lend(state) as loan:
                found = run(client, loan.component_id)
            first = found if first is None else first
            assert torch.equal(found, first)
        pids = [daemon.pid, *descendants(daemon.pid)]
        assert len(pids) >= 2 + client.status().world_size  # the daemon, the leader and the ranks
        client.close()
        daemon.stop(None)
        assert not daemon.runtime_dir.exists()
        assert not [pid for pid in pids if is_alive(pid)]
        assert shared_memory() == shared
        assert used_bytes() <= used + MIB
        if number == 1:
            fds = count_fds(os.getpid())
    assert count_fds(os.getpid()) <= fds


def test_rebuilt_groups_leave_nothing(
    rebuilding: tuple[DaemonProcess, Client],
    state: Mapping[str, torch.Tensor],
) -> None:
    daemon, client = rebuilding
    loan = client.lend(state)
    first = run(client, loan.component_id)
    ranks = client.status().world_size
    shared, used, fds, processes = shared_memory(), 0, 0, 0

    def is_rebuilt(status: DaemonStatus, starts: int) -> bool:
        return status.counters.group_starts == starts and status.group_state is GroupState.READY

    for number in range(REBUILDS):
        if number % 2 == 0:  # the other groups are rebuilt before there is a standby, or while it imports
            wait_until(lambda: len(children(daemon.pid)) == 2)  # the leader and the standby
        if number == 2:
            fds, processes, used = count_fds(daemon.pid), len(descendants(daemon.pid)), used_bytes()
        victim = client.status().workers[number % ranks].pid
        before = descendants(daemon.pid)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda starts=number + 2: is_rebuilt(client.status(), starts))
        assert torch.equal(run(client, loan.component_id), first)
        assert len([pid for pid in before if is_alive(pid)]) <= 1  # the standby, which leads now
    wait_until(lambda: len(children(daemon.pid)) == 2)
    wait_until(lambda: len(descendants(daemon.pid)) <= processes)
    wait_until(lambda: count_fds(daemon.pid) <= fds)
    wait_until(lambda: used_bytes() <= used + 64 * MIB)  # what a rank keeps after a job
    assert shared_memory() == shared
    loan.return_()


def wait_until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end_s, "not within the deadline"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
