"""Announced components: workers build their models while they have nothing else to do, before the bytes are lent."""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

from xditd.daemon.queue.commands import Script, Task, expect
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import XditdError
from xditd.ipc.outlines import Outline
from xditd.ipc.worker_messages import BuildModel, Done

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 8
"""Announcements that wait, of all clients; a further one replaces the oldest. A pipeline has about five models."""


class _Announcement(NamedTuple):
    session: Session
    outline: Outline


class Announcements:
    """Those that wait, oldest first. Jobs, lends and returns go before them; what they build no one has to use."""

    def __init__(self) -> None:
        self._waiting: list[_Announcement] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, session: Session, outline: Outline) -> None:
        """Note an announcement, unless one like it waits already."""
        if any(each.outline == outline for each in self._waiting):
            return
        self._waiting = [*self._waiting, _Announcement(session, outline)][-MAX_WAITING:]

    def forget(self, session: Session) -> None:
        """Drop the announcements of a client that has ended its session."""
        self._waiting = [each for each in self._waiting if each.session is not session]

    def take(self) -> Task[None] | None:
        """Return the task of the oldest announcement, which then waits no more; ``None`` if there is none."""
        if not self._waiting:
            return None
        outline = self._waiting.pop(0).outline

        def failed(error: XditdError) -> None:
            logger.info("model not built ahead label=%s code=%s: %s", outline.label, error.code, error.detail[:500])

        return Task(_build(outline), on_done=lambda _: None, on_failed=failed)


def _build(outline: Outline) -> Script[None]:
    answers = expect((yield lambda number: BuildModel(op_number=number, outline=outline)), Done)
    slowest_ms = max(answer.timings_ms.get("build", 0.0) for answer in answers)
    logger.info("model built ahead of its lend label=%s build_ms=%.1f", outline.label, slowest_ms)
