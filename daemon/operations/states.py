"""The lives of the worker group, of a loan and of a job: tables of the moves that are allowed."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final, TypeVar

from xditd.ipc.errors import Internal
from xditd.ipc.status import GroupState, JobState, LeaseState

S = TypeVar("S", GroupState, LeaseState, JobState)

GROUP_NEXT: Final[Mapping[GroupState, Set[GroupState]]] = {
    GroupState.STARTING: {GroupState.READY, GroupState.DEAD},
    GroupState.READY: {GroupState.BUSY, GroupState.DEAD},
    GroupState.BUSY: {GroupState.READY, GroupState.DEAD},
    GroupState.DEAD: {GroupState.STARTING, GroupState.GIVEN_UP},
    GroupState.GIVEN_UP: set(),
}
"""Every life ends in DEAD; only there is it decided whether another one follows."""

LEASE_NEXT: Final[Mapping[LeaseState, Set[LeaseState]]] = {
    LeaseState.LENDING: {LeaseState.LENT, LeaseState.RETURNING, LeaseState.ENDED},
    LeaseState.LENT: {LeaseState.LENDING, LeaseState.ADOPTED, LeaseState.RETURNING},
    LeaseState.ADOPTED: {LeaseState.RETURNING},
    LeaseState.RETURNING: {LeaseState.ENDED},
    LeaseState.ENDED: set(),
}
"""LENT goes back to LENDING when its bytes were rewritten, or when a rebuilt group has to map them again.
ADOPTED has no way back: the client's memory is not mapped any more."""

JOB_NEXT: Final[Mapping[JobState, Set[JobState]]] = {
    JobState.QUEUED: {JobState.RUNNING, JobState.FAILED},
    JobState.RUNNING: {JobState.DONE, JobState.CANCELLING, JobState.FAILED},
    JobState.CANCELLING: {JobState.FAILED},
    JobState.DONE: set(),
    JobState.FAILED: set(),
}
"""A job whose cancel was noted never ends as DONE, even where the workers finished first."""


def move(table: Mapping[S, Set[S]], now: S, to: S) -> S:
    """Return ``to`` when the table allows the move from ``now``.

    Raises:
        Internal: the table has no such move.
    """
    if to not in table[now]:
        raise Internal(f"{type(now).__name__} may not move from {now.value} to {to.value}")
    return to
