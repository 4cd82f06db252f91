"""How long a phase of training lasts, and what Ctrl-C does to it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType


@dataclass
class Interrupt:
    """Whether the program was interrupted while :meth:`watched`."""

    is_set: bool = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let the first interrupt end the phases in good order, so that nothing that was learned is lost.

        A second one ends the program as it would have without this.
        """

        def note(_number: int, _frame: FrameType | None) -> None:
            self.is_set = True
            signal.signal(signal.SIGINT, before)
            print("interrupted: the phase ends, and what it learned is written", flush=True)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Budget:
    """How long to train: ``steps`` if not 0, else ``seconds``; an ``interrupt`` ends both."""

    seconds: float
    steps: int = 0
    interrupt: Interrupt = field(default_factory=Interrupt)

    def progress(self, started: float, step: int) -> float:
        """Return how much of the training is done, from 0 to 1."""
        if self.interrupt.is_set:
            return 1.0
        if self.steps:
            return step / self.steps
        return min(1.0, (time.monotonic() - started) / max(self.seconds, 1e-9))
