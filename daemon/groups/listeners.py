"""Whom the supervisor tells what happens to the worker group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xditd.ipc.errors import WorkersUnavailable, XditdError
from xditd.ipc.worker_messages import Answer, Command, FilesDigested, StepReached


class GroupListener(Protocol):
    """Called from the loop; nothing here may block."""

    def group_ready(self) -> None:
        """Every rank has reported; nothing is mapped."""

    def group_ended(self, error: XditdError) -> None:
        """Nothing can be asked of the group any more, and what it had mapped is gone."""

    def group_given_up(self, error: WorkersUnavailable) -> None:
        """No further life follows."""

    def answered(self, command: Command, answers: Sequence[Answer]) -> None:
        """Every rank has answered ``command``; the answers are in rank order."""

    def step_reached(self, step: StepReached) -> None:
        """The running job got on."""

    def files_digested(self, report: FilesDigested) -> None:
        """A rank has read files that are on loan."""
