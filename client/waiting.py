"""Wait for a daemon to start and for its workers to be ready."""

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
"""Time between two status requests; starting workers takes seconds."""

SERVING: Final = (GroupState.READY, GroupState.BUSY)
"""States of a worker group that accepts jobs."""


def check_seconds(name: str, value: float) -> None:
    """Raise ``BadRequest`` unless a value is a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise BadRequest(f"{name}: {value!r} is not a number of seconds, 0 or more")


def check_deadline(value: float | None) -> None:
    """Raise ``BadRequest`` unless a method's ``deadline_s`` is a number of seconds, or ``None`` for no deadline."""
    if value is not None:
        check_seconds("deadline_s", value)


def why_not_serving(status: DaemonStatus) -> str:
    """Return the reason why the workers accept no jobs, or an empty string."""
    if status.group_state in SERVING:
        return ""
    if status.group_state is GroupState.STARTING and status.group_detail.startswith("workers are "):
        return status.group_detail
    state = status.group_state.value.replace("_", " ")
    return f"workers {state}: {status.group_detail}" if status.group_detail else f"workers {state}"


def wait_for(
    get_status: Callable[[], DaemonStatus], wait_s: float, *, workers: bool, show: Callable[[str], None]
) -> DaemonStatus:
    """Poll until a daemon answers and, with ``workers``, until its workers accept jobs; at least once.

    ``get_status`` is called again if the daemon exits, does not answer in time or ends the session.
    ``show`` is called with the reason for waiting whenever it changes.

    Raises:
        BadRequest: ``wait_s`` is not a number of seconds.
        DaemonUnreachable, SessionLost: no daemon answers within ``wait_s``.
        WorkersUnavailable: the workers are given up; waiting longer would not help.
        DeadlineExceeded: the daemon did not answer in time, or its workers are not ready within ``wait_s``.
    """
    check_seconds("wait_s", wait_s)
    clock = AwakeClock()
    began_s = clock.now_s()
    shown = ""
    while True:
        error: XditdError
        clock.now_s()  # counts the time that this process was suspended
        try:
            status = get_status()
        except (DaemonUnreachable, DeadlineExceeded, SessionLost) as no_answer:
            clock.count_gap()  # takes seconds if a daemon listens but does not answer
            error = type(no_answer)(f"{no_answer.detail}; none answered within {wait_s:g} s")
            reason = no_answer.detail
        else:
            clock.count_gap()
            why = why_not_serving(status)
            if not (workers and why):
                return status
            if status.group_state is GroupState.GIVEN_UP:
                raise WorkersUnavailable(f"{why}; fix the cause, then restart the daemon")
            error = DeadlineExceeded(f"{why}; not ready within {wait_s:g} s")
            reason = why
        rest_s = wait_s - clock.waited_s(began_s)
        if rest_s <= 0:
            raise error
        if reason != shown:
            shown = reason
            show(reason)
        time.sleep(min(_POLL_S, rest_s))
