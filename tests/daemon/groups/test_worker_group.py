"""Starts of the group's leader that fail with a system error."""

from __future__ import annotations

import errno
import os
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
