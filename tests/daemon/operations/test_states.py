from __future__ import annotations

from typing import Any

import pytest

from xditd.daemon.groups.lifecycle import GROUP_NEXT
from xditd.daemon.loans.leases import LEASE_NEXT
from xditd.daemon.operations.states import move
from xditd.daemon.queue.jobs import JOB_NEXT
from xditd.ipc.errors import Internal
from xditd.ipc.status import GroupState, JobState, LeaseState

TABLES: list[tuple[Any, Any]] = [(GROUP_NEXT, GroupState), (LEASE_NEXT, LeaseState), (JOB_NEXT, JobState)]


@pytest.mark.parametrize(("table", "states"), TABLES)
def test_every_state_has_its_moves_and_can_be_reached(table: Any, states: Any) -> None:
    assert set(table) == set(states)
    reached = {next(iter(states)), *(to for moves in table.values() for to in moves)}
    assert reached == set(states)


@pytest.mark.parametrize(("table", "states"), TABLES)
def test_moves_outside_the_table_are_refused(table: Any, states: Any) -> None:
    for now in states:
        for to in states:
            if to in table[now]:
                assert move(table, now, to) is to
            else:
                with pytest.raises(Internal, match=f"from {now.value} to {to.value}"):
                    move(table, now, to)


def test_ends_are_final() -> None:
    for table, end in ((GROUP_NEXT, GroupState.GIVEN_UP), (LEASE_NEXT, LeaseState.ENDED), (JOB_NEXT, JobState.DONE)):
        assert not table[end]  # type: ignore[index]


def test_a_cancelled_job_never_ends_as_done() -> None:
    assert JOB_NEXT[JobState.CANCELLING] == {JobState.FAILED}
