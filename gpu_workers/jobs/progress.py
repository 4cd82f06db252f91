"""Between the steps of a job: whether to go on, and what rank 0's listener hears."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from xditd.gpu_workers.parallel.rank_sync import broadcast_stop
from xditd.ipc.errors import Cancelled


class Progress:
    """What a job does between steps: agree whether to go on, keep the host close to the GPU, tell rank 0's listener.

    ``is_cancelled`` and ``tell`` are used on rank 0 alone.
    """

    def __init__(
        self,
        is_leader: bool,
        device: torch.device,
        is_cancelled: Callable[[], bool],
        tell: Callable[[int, int, float], None],
    ) -> None:
        self._is_leader = is_leader
        self._is_cancelled = is_cancelled
        self._tell = tell
        self._events = [torch.cuda.Event(), torch.cuda.Event()] if device.type == "cuda" else []
        self._started = time.perf_counter()
        self.first_step_ms = 0.0

    def step(self, done: int, total: int) -> None:
        """Call after each step was issued.

        Raises:
            Cancelled: on every rank at the same step.
        """
        if self._events:
            # Wait for the step before this one: the host then runs at most one step ahead, so that progress and
            # cancel are true to the GPU, and the GPU never waits for the host.
            self._events[done % 2].record()
            if done > 1:
                self._events[(done - 1) % 2].synchronize()
        elapsed_s = time.perf_counter() - self._started
        if done == 1:
            self.first_step_ms = elapsed_s * 1e3
        if self._is_leader:
            self._tell(done, total, elapsed_s)
        if broadcast_stop(self._is_leader and self._is_cancelled()):
            raise Cancelled(f"cancelled after step {done} of {total}")
