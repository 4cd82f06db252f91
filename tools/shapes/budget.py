"""How long a phase of training lasts, and what Ctrl-C and SIGTERM do to it."""

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
        """Let the first Ctrl-C or SIGTERM end the phases in good order, so that nothing that was learned is lost.

        Ctrl-C after that ends the program as it would have without this. Another SIGTERM changes nothing: timeout(1)
        sends two, one to the program and one to its group.
        """

        def note(_number: int, _frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, interrupts)
            if not self.is_set:
                print("interrupted: the phase ends, and what it learned is written", flush=True)
            self.is_set = True

        interrupts, ends = (signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, interrupts)
            signal.signal(signal.SIGTERM, ends)


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
