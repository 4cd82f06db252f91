from __future__ import annotations

import pytest

from xditd.daemon.queue.jobs import Job, op_of
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Internal
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import JobState


def test_moves_follow_the_table() -> None:
    session = Session(b"a", "", ProcessIdentity(pid=1, start_ticks=0), -1, "test")
    waiting = Job(session, GetStatus(request_id="1"), lambda _: pytest.fail("not to be run"))
    with pytest.raises(Internal):
        waiting.move(JobState.DONE)
    waiting.move(JobState.RUNNING)
    waiting.move(JobState.CANCELLING)
    assert waiting.status().state is JobState.CANCELLING


def test_operation_is_the_tag_of_the_request() -> None:
    assert op_of(GetStatus) == op_of(GetStatus(request_id="1")) == "get_status"
