"""What the first lend needs, imported module by module by a rank that is ready, between the daemon's commands."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from xditd.gpu_workers.models import registry
from xditd.gpu_workers.process import preload

logger = logging.getLogger(__name__)

QUIET_S: Final = 0.5
"""After a command, how long there must be no other before the next module is imported: one that comes meanwhile waits
for the module."""


class LendImports:
    """The imports that are left, in their order: what lends need, then what comes later.

    A command waits for one module, not for all of them, and a stop is obeyed. A lend waits for what all lends need, as
    that comes without transformers: less than it would import itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._for_lends = deque[Callable[[], None]](partial(preload.import_all, (name,)) for name in preload.FOR_LENDS)
        self._for_lends.append(self._add_families)
        self._after = deque[Callable[[], None]](partial(preload.import_all, (name,)) for name in preload.AFTER_LENDS)
        self._not_before_s = 0.0
        self._took_s = 0.0

    @property
    def wait_s(self) -> float | None:
        """How long to wait for a command before the next :meth:`run_next`; ``None`` once all is imported."""
        return max(0.0, self._not_before_s - self._clock()) if self._for_lends or self._after else None

    def note_command(self) -> None:
        """Wait for :data:`QUIET_S` from now: commands often come one after the other."""
        self._not_before_s = self._clock() + QUIET_S

    def run_next(self) -> None:
        """Import the next module, if there is one and it is time."""
        steps = self._for_lends or self._after
        if steps and self._clock() >= self._not_before_s:
            with self._timed():
                steps.popleft()()

    def finish_for_lend(self) -> None:
        """Import what lends need and is left, at once."""
        if self._for_lends:
            with self._timed():
                while self._for_lends:
                    self._for_lends.popleft()()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        is_for_lends = bool(self._for_lends)
        began_s = time.perf_counter()
        gc.collect()  # else the garbage of commands would be kept with the modules, and memory that it refers to
        with preload.without_collections():
            yield
        if is_for_lends:
            self._took_s += time.perf_counter() - began_s
            if not self._for_lends:
                logger.info("what lends need is imported imports_s=%.2f", self._took_s)

    def _add_families(self) -> None:
        """Import the descriptions of our own families; the operations of each are a step of their own."""
        self._for_lends.extend(partial(preload.import_family, family) for family in registry.own_families())
        self._for_lends.append(partial(preload.import_all, registry.DESCRIBED))
