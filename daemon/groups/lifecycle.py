"""The lives of a worker group: which states follow each other, how often it is rebuilt, and who hears of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Final, Protocol

from xditd.ipc.errors import WorkersUnavailable, XditdError
from xditd.ipc.status import GroupState
from xditd.ipc.worker_messages import Answer, Command, FilesDigested, StepReached

GROUP_NEXT: Final[Mapping[GroupState, Set[GroupState]]] = {
    GroupState.STARTING: {GroupState.READY, GroupState.DEAD},
    GroupState.READY: {GroupState.BUSY, GroupState.DEAD},
    GroupState.BUSY: {GroupState.READY, GroupState.DEAD},
    GroupState.DEAD: {GroupState.STARTING, GroupState.GIVEN_UP},
    GroupState.GIVEN_UP: set(),
}
"""Every life ends in DEAD; only there is it decided whether another one follows."""

STEADY_S: Final = 600.0
"""A group that was ready for so long has worked, even if nobody asked it for anything."""

_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 30.0


class RestartPolicy:
    """Count lives that ended without a served job; at most ``limit`` rebuilds in a row, each waiting twice as long."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures = 0

    def note_served(self) -> None:
        """A job was served: the group works."""
        self.failures = 0

    def note_end(self, ready_for_s: float) -> float | None:
        """Note the end of a life. Returns the seconds to wait before the next, or ``None`` when there is none."""
        if ready_for_s >= STEADY_S:
            self.failures = 0
        self.failures += 1
        if self.failures > self.limit:
            return None
        return min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self.failures - 1))


class GroupListener(Protocol):
    """Called from the event loop; nothing here may block."""

    def group_ready(self) -> None:
        """Every rank has reported; nothing is mapped."""

    def group_ended(self, error: XditdError) -> None:
        """Nothing can be asked of the group any more, and what it had mapped is gone."""

    def group_given_up(self, error: WorkersUnavailable) -> None:
        """No further life follows."""

    def answered(self, command: Command, answers: Sequence[Answer]) -> None:
        """Every rank has answered ``command``; the answers are in rank order."""

    def step_reached(self, step: StepReached) -> None:
        """The running job has done another step."""

    def files_digested(self, report: FilesDigested) -> None:
        """A rank has read files of a loan."""
