"""Announced components: workers build their models while they have nothing else to do, before the bytes are lent.

A model whose first forward takes much longer than later ones is warmed up once no lend has come for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from xditd.daemon.queue.commands import Script, Task, expect
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import XditdError
from xditd.ipc.outlines import Outline
from xditd.ipc.worker_messages import BuildModel, Done, ModelBuilt, WarmUpModel

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 8
"""Announcements that wait, of all clients; a further one replaces the oldest. A pipeline has about five models."""
QUIET_S: Final = 0.5
"""Seconds between the build of a model and its warm-up. A lend that comes during a warm-up waits longer than the
warm-up saves. So a model that is lent at once is not warmed up."""


class _Announcement(NamedTuple):
    session: Session
    outline: Outline


class Announcements:
    """Announcements that wait, oldest first. Jobs, lends and returns go first. Nobody has to use the built models.

    ``call_later`` calls a function after seconds, and then asks for :meth:`take`.
    """

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._call_later = call_later
        self._waiting: list[_Announcement] = []
        self._building: _Announcement | None = None
        """The one whose build was last begun; ``None`` once its client has ended its session."""
        self._built: list[_Announcement] = []
        """Announcements whose models are built and can be warmed up, before :data:`QUIET_S` have passed."""
        self._quiet: list[_Announcement] = []
        """Those that come next: :data:`QUIET_S` have passed since the build."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, session: Session, outline: Outline) -> None:
        """Note an announcement, unless the same one of this client waits already."""
        announcement = _Announcement(session, outline)
        if announcement not in self._waiting:
            self._waiting = [*self._waiting, announcement][-MAX_WAITING:]

    def forget(self, session: Session) -> None:
        """Drop the announcements of a client that has ended its session."""
        for each in (self._waiting, self._built, self._quiet):
            each[:] = [announcement for announcement in each if announcement.session is not session]
        if self._building is not None and self._building.session is session:
            self._building = None

    def take(self) -> Task[Any] | None:
        """Return the task of the oldest announcement, which then waits no more; ``None`` if there is none.

        Models are built before others are warmed up.
        """
        if self._waiting:
            announcement = self._building = self._waiting.pop(0)
            outline, what = announcement.outline, "model not built ahead"
            return Task(_build(outline), partial(self._note_built, announcement), partial(_log_failed, outline, what))
        if self._quiet:
            outline, what = self._quiet.pop(0).outline, "model not warmed up"
            return Task(_warm_up(outline), lambda _: None, partial(_log_failed, outline, what))
        return None

    def _note_built(self, announcement: _Announcement, has_warm_up: bool) -> None:
        if has_warm_up and self._building is announcement:
            self._built = [*self._built, announcement][-MAX_WAITING:]
            self._call_later(QUIET_S, partial(self._note_quiet, announcement))

    def _note_quiet(self, announcement: _Announcement) -> None:
        if announcement in self._built:
            self._built.remove(announcement)
            self._quiet = [*self._quiet, announcement][-MAX_WAITING:]


def _build(outline: Outline) -> Script[bool]:
    answers = expect((yield lambda number: BuildModel(op_number=number, outline=outline)), ModelBuilt)
    slowest_ms = max(answer.timings_ms.get("build", 0.0) for answer in answers)
    logger.info("model built ahead of its lend label=%s build_ms=%.1f", outline.label, slowest_ms)
    return all(answer.has_warm_up for answer in answers)


def _warm_up(outline: Outline) -> Script[None]:
    expect((yield lambda number: WarmUpModel(op_number=number, outline=outline)), Done)


def _log_failed(outline: Outline, what: str, error: XditdError) -> None:
    logger.info("%s label=%s code=%s: %s", what, outline.label, error.code, error.detail[:500])
