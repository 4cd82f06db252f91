"""Starts of the group's leader that fail with a system error."""

from __future__ import annotations

import errno
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from xditd.daemon.front.service import Service
from xditd.daemon.groups import worker_group
from xditd.ipc.status import GroupState


@pytest.mark.parametrize(
    ("number", "state", "says"),
    [
        (errno.EAGAIN, GroupState.DEAD, "Resource temporarily unavailable"),
        (errno.ENOMEM, GroupState.DEAD, "Cannot allocate memory"),
        (errno.EMFILE, GroupState.GIVEN_UP, "ulimit -Hn"),
        (errno.EACCES, GroupState.GIVEN_UP, "correct [workers] command"),
    ],
)
def test_only_what_may_pass_is_tried_again(
    service: Service, monkeypatch: pytest.MonkeyPatch, number: int, state: GroupState, says: str
) -> None:
    """Replace the leader by one that fails to start: root has no limits on processes."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(worker_group, "Leader", refuse)
    service.group.start()
    assert service.group.state is state
    assert says in service.group.detail


def test_a_leader_that_the_kernel_ended_for_want_of_memory_is_reported_with_the_limit(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(worker_group, "Leader", lambda *_: SimpleNamespace(pid=1))
    monkeypatch.setattr(worker_group, "count_memory_kills", lambda: 3)
    monkeypatch.setattr(worker_group, "explain_kill", lambda before: asked.append(before) or "out of host memory")
    output: Any = SimpleNamespace(
        explain=lambda status: f"killed by {status}", has_cause=False, is_final=lambda _: False
    )
    service.group.start()
    service.group._leader_gone(-signal.SIGKILL, output)
    assert (asked, service.group.detail) == ([3], "killed by -9; out of host memory")
    service.group.start()
    service.group._leader_gone(1, output)  # not killed
    assert (asked, service.group.detail) == ([3], "killed by 1")
