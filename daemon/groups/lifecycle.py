"""Lifecycle of a worker group: its state transitions, its restart policy, and the interface of its listener."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Final, Protocol

from xditd.ipc.errors import WorkersUnavailable, XditdError
from xditd.ipc.status import GroupState
from xditd.ipc.worker_messages import Answer, Command, FilesDigested, FramesReached, StepReached

GROUP_NEXT: Final[Mapping[GroupState, Set[GroupState]]] = {
    GroupState.STARTING: {GroupState.READY, GroupState.DEAD},
    GroupState.READY: {GroupState.BUSY, GroupState.DEAD},
    GroupState.BUSY: {GroupState.READY, GroupState.DEAD},
    GroupState.DEAD: {GroupState.STARTING, GroupState.GIVEN_UP},
    GroupState.GIVEN_UP: set(),
}
"""A group always ends in DEAD, from which it is started again or given up."""

STEADY_S: Final = 600.0
"""A group that was ready for so long counts as working, even if it served no job."""

_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 30.0


class RestartPolicy:
    """Allow ``limit`` restarts in a row without a served job, with a delay that doubles each time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures = 0

    def note_served(self) -> None:
        """Reset the count: a job was served."""
        self.failures = 0

    def note_end(self, ready_for_s: float) -> float | None:
        """Note that the group ended. Returns the seconds until its restart, or ``None`` to give up."""
        if ready_for_s >= STEADY_S:
            self.failures = 0
        self.failures += 1
        if self.failures > self.limit:
            return None
        return min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self.failures - 1))


class GroupListener(Protocol):
    """Receives the events of a worker group, in the event loop; no method may block."""

    def group_ready(self) -> None:
        """Every rank has reported; nothing is mapped."""

    def group_ended(self, error: XditdError) -> None:
        """The group takes no more commands. Its processes may still have memory mapped."""

    def processes_ended(self) -> None:
        """No process of the ended group is left, so nothing is mapped."""

    def group_given_up(self, error: WorkersUnavailable) -> None:
        """The group is not restarted."""

    def answered(self, command: Command, answers: Sequence[Answer]) -> None:
        """Every rank has answered ``command``; the answers are in rank order."""

    def step_reached(self, step: StepReached) -> None:
        """The running job has finished a step."""

    def frames_reached(self, reached: FramesReached) -> None:
        """The running job has decoded frames of a video."""

    def files_digested(self, report: FilesDigested) -> None:
        """A rank has digested files of a component."""
