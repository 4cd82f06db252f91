"""A daemon with one worker and one with two, on the CPU, for modules that run as their class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from running_daemon import RunningDaemon

from xditd.client import Client


@pytest.fixture(scope="session")
def two_workers(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    started = start_daemon(2)
    started.wait_ready()
    return started


@pytest.fixture
def client(one_worker: RunningDaemon) -> Iterator[Client]:
    with one_worker.connect() as connected:
        yield connected


@pytest.fixture
def own_daemon(start_daemon: Callable[..., RunningDaemon]) -> Iterator[RunningDaemon]:
    daemon = start_daemon(1)
    daemon.wait_ready()
    yield daemon
    if daemon.process.poll() is None:
        daemon.stop()


@pytest.fixture
def as_many_threads_as_the_worker() -> Iterator[None]:
    """Sums over another number of threads may differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
