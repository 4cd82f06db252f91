"""Waiting for a daemon that starts, and for its workers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from xditd.ipc.awake_clock import AwakeClock
from xditd.ipc.errors import (
    BadRequest,
    DaemonUnreachable,
    DeadlineExceeded,
    SessionLost,
    WorkersUnavailable,
    XditdError,
)
from xditd.ipc.status import DaemonStatus, GroupState

_POLL_S: Final = 0.1
"""Between two looks: nothing tells when a socket appears, and workers take seconds to start."""

SERVING: Final = (GroupState.READY, GroupState.BUSY)
"""States of a group that takes jobs."""


def check_seconds(name: str, value: float) -> None:
    """Check how long to wait.

    Raises:
        BadRequest: it is no time.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise BadRequest(f"{name}: {value!r} is not a number of seconds from 0")


def why_not_serving(status: DaemonStatus) -> str:
    """Say why there are no workers for a job; empty where there are."""
    if status.group_state in SERVING:
        return ""
    if status.group_state is GroupState.STARTING and status.group_detail.startswith("workers are "):
        return status.group_detail
    state = status.group_state.value.replace("_", " ")
    return f"workers {state}: {status.group_detail}" if status.group_detail else f"workers {state}"


def wait_for(
    look: Callable[[], DaemonStatus], wait_s: float, *, workers: bool, show: Callable[[str], None]
) -> DaemonStatus:
    """Look until a daemon answers, and, if ``workers``, until its workers take jobs; at least once.

    ``show`` gets what is waited for whenever it changes. A daemon that ends, falls silent (it is stopped, or its
    machine is starved) or ends the session meanwhile is asked again.

    Raises:
        BadRequest: ``wait_s`` is no time.
        DaemonUnreachable, SessionLost: no daemon answers within ``wait_s``.
        WorkersUnavailable: the workers are given up; waiting longer would not help.
        DeadlineExceeded: the daemon was there, but it, or its workers, are not ready within ``wait_s``.
    """
    check_seconds("wait_s", wait_s)
    clock = AwakeClock()
    began_s = clock.now_s()
    shown = ""
    while True:
        error: XditdError
        clock.now_s()  # what was slept through, if this process stood still
        try:
            status = look()
        except (DaemonUnreachable, DeadlineExceeded, SessionLost) as no_answer:
            clock.count_gap()  # seconds, where a daemon is there and does not answer
            error = type(no_answer)(f"{no_answer.detail}; none answered within {wait_s:g} s")
            said = no_answer.detail
        else:
            clock.count_gap()
            why = why_not_serving(status)
            if not (workers and why):
                return status
            if status.group_state is GroupState.GIVEN_UP:
                raise WorkersUnavailable(f"{why}; cure the cause, then restart the daemon")
            error = DeadlineExceeded(f"{why}; not ready within {wait_s:g} s")
            said = why
        rest_s = wait_s - clock.waited_s(began_s)
        if rest_s <= 0:
            raise error
        if said != shown:
            shown = said
            show(said)
        time.sleep(min(_POLL_S, rest_s))
