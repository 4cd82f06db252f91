"""Progress and cancellation of a running job: steps, then the frames of a video."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from xditd.gpu_workers.parallel.rank_sync import broadcast_stop
from xditd.ipc.errors import Cancelled


class Progress:
    """Progress and cancellation of a job: all ranks stop at the same step, or chunk of frames.

    ``is_cancelled``, ``report_step`` and ``report_frames`` are called on rank 0 alone.
    """

    def __init__(
        self,
        is_leader: bool,
        device: torch.device,
        is_cancelled: Callable[[], bool],
        report_step: Callable[[int, int, float], None],
        report_frames: Callable[[int, int, float], None],
    ) -> None:
        self._is_leader = is_leader
        self._is_cancelled = is_cancelled
        self._report_step = report_step
        self._report_frames = report_frames
        self._events = [torch.cuda.Event(blocking=True) for _ in range(2)] if device.type == "cuda" else []
        self._launched = 0
        self._started = time.perf_counter()
        self.first_step_ms = 0.0

    def step(self, done: int, total: int) -> None:
        """Call after each step was launched, on all ranks.

        Raises:
            Cancelled: on every rank at the same step.
        """
        self._wait_for_previous()
        elapsed_s = time.perf_counter() - self._started
        if done == 1:
            self.first_step_ms = elapsed_s * 1e3
        if self._is_leader:
            self._report_step(done, total, elapsed_s)
        if broadcast_stop(self._is_leader and self._is_cancelled()):
            raise Cancelled(f"cancelled after step {done} of {total}")

    def frames(self, done: int, total: int, *, is_shared: bool) -> None:
        """Call after each chunk of a video was launched: on all ranks if the decode is shared, else on rank 0 alone.

        Raises:
            Cancelled: where it was called.
        """
        self._wait_for_previous()
        if self._is_leader:
            self._report_frames(done, total, time.perf_counter() - self._started)
        is_cancelled = self._is_leader and self._is_cancelled()
        if broadcast_stop(is_cancelled) if is_shared else is_cancelled:
            raise Cancelled(f"cancelled after frame {done} of {total}")

    def _wait_for_previous(self) -> None:
        """Wait for the previous step or chunk: the host runs at most one ahead.

        So progress and cancellation follow the GPU, and the GPU never waits for the host.
        """
        if self._events:
            self._events[self._launched % 2].record()
            if self._launched:
                self._events[(self._launched - 1) % 2].synchronize()
            self._launched += 1
