"""Notice within seconds that something of the runtime folder is gone: make it again, or end the daemon."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from xditd.daemon.operations.event_loop import Loop
from xditd.daemon.operations.runtime_folder import RuntimeFolder
from xditd.ipc.errors import XditdError

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
MOST_FAILURES: Final = 3
"""Looks in a row at which mending fails, until the daemon ends: another process may be removing the folder just now."""


class FolderWatch:
    """Look at ``folder`` every :data:`LOOK_EVERY_S`; ``give_up`` is called once, with why it cannot be mended."""

    def __init__(self, loop: Loop, folder: RuntimeFolder, give_up: Callable[[XditdError], None]) -> None:
        self._loop = loop
        self._folder = folder
        self._give_up = give_up
        self._failures = 0

    def begin(self) -> None:
        self._loop.call_later(LOOK_EVERY_S, self.look)

    def look(self) -> None:
        try:
            made = self._folder.restore()
        except XditdError as error:
            self._failures += 1
            if self._failures == MOST_FAILURES:
                self._give_up(error)
                return
            logger.warning("runtime folder was harmed and is not mended yet: %s", error.detail)
        else:
            self._failures = 0
            if made:
                logger.warning(
                    "runtime folder was harmed by another program; made again: %s",
                    ", ".join(path.name for path in made),
                )
        self.begin()
