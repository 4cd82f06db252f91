"""A real daemon that a test session starts, and the fixture ``start_daemon``, which ends it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from xditd.client import Client, DaemonStatus, DaemonUnreachable
from xditd.ipc.status import GroupState

DEADLINE_S = 120.0
STEP_DEADLINE_S = 60.0
"""Where other processes use the cores, a step of milliseconds has taken more than the 10 s of a daemon that serves."""
_CPUS = sorted(os.sched_getaffinity(0), reverse=True)
_NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Of this test process among those that run at the same time."""
ONE_CPU = ("taskset", "--cpu-list", str(_CPUS[_NUMBER % len(_CPUS)]))
"""A worker has as many threads as it has CPUs, and sums over another number may differ in their last bits: tests that
compare these have one thread. Each test process has a CPU of its own, if there are so many."""
T = TypeVar("T")


class RunningDaemon:
    """A daemon that this test session started, with its log."""

    def __init__(self, folder: Path, workers: int, device: str, flags: Sequence[str], before: Sequence[str]) -> None:
        self.runtime_dir = folder / "run"
        self.log = folder / "daemon.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
        command = [*before, sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(self.runtime_dir)]
        command += ["--workers", str(workers), "--device", device, "--step-deadline-s", str(STEP_DEADLINE_S), *flags]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment)

    def connect(self) -> Client:
        return until(self._try_connect, "the daemon to answer", self.log)

    def _try_connect(self) -> Client | None:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return Client(self.runtime_dir, name="test")
        except DaemonUnreachable:
            return None

    def status(self) -> DaemonStatus:
        with self.connect() as client:
            return client.status()

    def wait_ready(self) -> DaemonStatus:
        """Wait until the group has answered and nothing runs."""

        def ready() -> DaemonStatus | None:
            status = self.status()
            return status if status.group_state is GroupState.READY else None

        return until(ready, "the workers to be ready", self.log)

    def log_text(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


def until(probe: Callable[[], T | None], what: str | Callable[[], str], log: Path | None = None) -> T:
    """Wait for a condition, with a deadline; ``what`` may be a function, which says what is still awaited then."""
    ends = time.monotonic() + DEADLINE_S
    while (found := probe()) is None or found is False:
        if time.monotonic() > ends:
            tail = log.read_text()[-4000:] if log else ""
            pytest.fail(f"waited {DEADLINE_S} s for {what if isinstance(what, str) else what()}\n{tail}")
        time.sleep(0.02)  # between two looks; what is waited for is the condition above
    return found


def until_empty(client: Client, *but: str) -> None:
    """Wait until the daemon has no job, and no component but those of these ids; a failure names what is left."""

    def left() -> list[str]:
        status = client.status()
        components = [each for each in status.components if each.component_id not in but]
        return [
            *(f"{each.op} {each.request_id} {each.state.value}" for each in status.jobs),
            *(f"{each.label} {each.component_id}" for each in components),
        ]

    until(lambda: not left(), lambda: f"the end of {', '.join(left())}")


@pytest.fixture(scope="session")
def start_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningDaemon]]:
    running: list[RunningDaemon] = []

    def start(
        workers: int,
        device: str = "cpu",
        *,
        flags: Sequence[str] = (),
        before: Sequence[str] = (),
        folder: Path | None = None,
    ) -> RunningDaemon:
        """Start a daemon; one worker on the CPU has one thread.

        ``before`` goes in front of the command; ``folder`` is that of an earlier daemon.
        """
        if (workers, device) == (1, "cpu"):
            before = (*before, *ONE_CPU)
        daemon = RunningDaemon(folder or tmp_path_factory.mktemp("d"), workers, device, flags, before)
        running.append(daemon)
        return daemon

    yield start
    alive = [daemon for daemon in running if daemon.process.poll() is None]
    for daemon in alive:
        daemon.process.terminate()
    for daemon in alive:  # they end side by side
        daemon.process.wait(timeout=30)
