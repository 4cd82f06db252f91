"""After a fault: the same seed gives the same bits, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch

from xditd.client import Client
from xditd.ipc.status import GroupState

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Footprint:
    """What a daemon and its workers hold, without the numbers that a rebuilt group changes."""

    processes: int
    daemon_fds: int
    worker_fds: tuple[int, ...]
    segments: tuple[int, ...]
    """Memfds that each worker has mapped, but for those of this process, which keeps its own for its next job."""
    components: int
    clients: int
    jobs: int

    def is_within(self, before: Footprint) -> bool:
        """Whether nothing grew; a file of the interpreter may be open in passing, so two descriptors are room.

        What the tests before have dropped may leave meanwhile: their clients, and blocks that ranks unmap when they
        notice that the client has closed them. The good job after the test shows that its loan is still mapped.
        """
        return (
            (self.processes, self.jobs) == (before.processes, before.jobs)
            and self.components <= before.components
            and self.clients <= before.clients
            and self.daemon_fds <= before.daemon_fds + 2
            and all(now <= then + 2 for now, then in zip(self.worker_fds, before.worker_fds, strict=True))
            and all(now <= then for now, then in zip(self.segments, before.segments, strict=True))
        )


def differences(before: Footprint, after: Footprint | None) -> str:
    """What has changed, for the message of a failure."""
    if after is None:
        return "a group that is not ready"
    pairs = [(each.name, getattr(before, each.name), getattr(after, each.name)) for each in fields(Footprint)]
    return ", ".join(f"{name} {now}, before {then}" for name, then, now in pairs if now != then)


def measure(client: Client, daemon_pid: int, processes: SimpleNamespace) -> Footprint | None:
    """Take the footprint; ``None`` while the group is not up."""
    status = client.status()
    if status.group_state is not GroupState.READY:
        return None
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        workers = [worker.pid for worker in status.workers]
        own = processes.memfds(os.getpid())
        return Footprint(
            processes=len(processes.descendants(daemon_pid)),
            daemon_fds=processes.count_fds(daemon_pid),
            worker_fds=tuple(processes.count_fds(pid) for pid in workers),
            segments=tuple(len(processes.memfds(pid) - own) for pid in workers),
            components=len(status.components),
            clients=status.clients,
            jobs=len(status.jobs),
        )
    return None


@pytest.fixture(scope="session")
def seed_bits(daemon, files, make_inputs, run) -> torch.Tensor:
    """The latents of the one job that every test repeats, made before anything went wrong."""
    with daemon.connect() as client, client.lend(files.transformer) as loan:
        return run(client, loan, make_inputs(seed=5))


@pytest.fixture
def good_job(client, transformer, make_inputs, run, seed_bits) -> Callable[..., None]:
    """Run the job of :func:`seed_bits` again: the bits must be the same."""
    inputs = make_inputs(seed=5)

    def check(by: Client = client, loan: object = transformer) -> None:
        assert torch.equal(run(by, loan, inputs), seed_bits)

    return check


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test with the shared daemon: the same bits again, and everything as large as it was."""
    if "daemon" not in request.fixturenames:
        yield
        return
    daemon, client = request.getfixturevalue("daemon"), request.getfixturevalue("client")
    good_job, processes = request.getfixturevalue("good_job"), request.getfixturevalue("processes")
    good_job()
    before = measure(client, daemon.process.pid, processes)
    assert before is not None  # nothing has gone wrong yet
    yield
    good_job()  # waits for a group that is being rebuilt, in which the loan is mapped again
    ends = time.monotonic() + DEADLINE_S
    while (after := measure(client, daemon.process.pid, processes)) is None or not after.is_within(before):
        assert time.monotonic() < ends, f"left behind: {differences(before, after)}"
        time.sleep(0.05)  # between two looks


@pytest.fixture
def start_script() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run Python text in a process of its own, with pipes; it is killed after the test if it is still there."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
