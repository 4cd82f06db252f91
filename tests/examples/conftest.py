"""A daemon with one worker on the CPU, for programs of users."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from running_daemon import RunningDaemon, start_daemon

__all__ = ["start_daemon"]


@pytest.fixture(scope="session")
def one_worker(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    started = start_daemon(1)
    started.wait_ready()
    return started
