"""A daemon with one worker and one with two, on the CPU, for modules that run as their class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from running_daemon import RunningDaemon, start_daemon

from xditd.client import Client

__all__ = ["start_daemon"]


@pytest.fixture(scope="session")
def one_worker(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    started = start_daemon(1)
    started.wait_ready()
    return started


@pytest.fixture(scope="session")
def two_workers(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    started = start_daemon(2)
    started.wait_ready()
    return started


@pytest.fixture
def client(one_worker: RunningDaemon) -> Iterator[Client]:
    with one_worker.connect() as connected:
        yield connected
