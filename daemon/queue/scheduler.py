"""The life of a job at the daemon: taken in, announced, run, cancelled, answered, logged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final

from xditd.daemon.operations.counters import Accounts
from xditd.daemon.operations.event_loop import Loop, Timer
from xditd.daemon.queue.commands import Errand
from xditd.daemon.queue.jobs import Job, JobQueue
from xditd.daemon.sockets.reply_sender import Front, failed
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Cancelled, XditdError
from xditd.ipc.protocol import Reply, TimingsMs
from xditd.ipc.replies import Queued, StepDone
from xditd.ipc.status import JobState
from xditd.ipc.worker_messages import StepReached

logger = logging.getLogger(__name__)

ANNOUNCE_EVERY_S: Final = 5.0
"""How often waiting clients hear where they are, so that silence means something."""

ANNOUNCE_PAUSE_S: Final = 0.1
"""From one announcement to the next. Without it a thousand short jobs a second would tell each of the many that wait a
thousand times, and one that reads slowly would be taken for one that does not read."""


class Desk:
    """Own the queue. ``interrupt`` asks the workers to stop what they run; ``why_waiting`` says for what jobs wait."""

    def __init__(
        self,
        loop: Loop,
        front: Front,
        queue: JobQueue,
        interrupt: Callable[[], None],
        why_waiting: Callable[[], str],
        accounts: Accounts,
    ) -> None:
        self.queue = queue
        self.accounts = accounts
        self.jobs_done = 0
        self.jobs_failed = 0
        self.jobs_cancelled = 0
        self.last_job_ms: TimingsMs = {}
        self._loop = loop
        self._front = front
        self._interrupt = interrupt
        self._why_waiting = why_waiting
        self._announce_timer: Timer | None = None
        self._announced_s = -math.inf
        self._unlogged: list[tuple[object, ...]] = []

    def submit(self, job: Job, *, will_wait: bool) -> None:
        """Let a job wait for its turn; its client hears so unless the turn is now.

        Raises:
            BadRequest: its request id is in use.
            Busy: the queue is full.
        """
        self.queue.add(job)
        if will_wait:
            self._tell_position(job, next(place for place, each in enumerate(self.queue) if each is job))
        self._announce_later(ANNOUNCE_EVERY_S)

    def next_errand(self) -> Errand[Reply] | None:
        """Begin the next job."""
        job = self.queue.take()
        if job is None:
            return None
        self._announce_move()
        return Errand(
            job.write_script(job),
            on_done=lambda reply: self._end(job, reply, None),
            on_failed=lambda error: self._end(job, None, error),
        )

    def step_reached(self, step: StepReached) -> None:
        job = self.queue.running
        if job is not None:
            job.step, job.total_steps = step.step, step.total_steps
            self.accounts.step_reached(step)
            event = StepDone(
                request_id=job.request.request_id,
                step=step.step,
                total_steps=step.total_steps,
                elapsed_s=step.elapsed_s,
            )
            self._front.reply(job.session, event)

    def cancel(self, job: Job, why: XditdError) -> None:
        """End a job with ``why``: now if it waits, else as soon as the workers have let go of its memory."""
        if job.state is JobState.QUEUED:
            self._end(job, None, why)
        elif job.ending is None:
            job.ending = why
            job.move(JobState.CANCELLING)
            self._interrupt()

    def cancel_session(self, session: Session, why: XditdError) -> None:
        for job in self.queue:
            if job.session is session:
                self.cancel(job, why)

    def cancel_using(self, component_id: str, why: XditdError) -> None:
        for job in self.queue:
            if component_id in job.component_ids:
                self.cancel(job, why)

    def cancel_all(self, why: XditdError) -> None:
        for job in self.queue:
            self.cancel(job, why)

    def log_ended(self) -> None:
        """Write the lines of the jobs that have ended. Called once their replies have left, which need not wait for it.

        That is in the same round of the loop: who has read a reply finds its line in the log.
        """
        unlogged, self._unlogged = self._unlogged, []
        for line in unlogged:
            logger.info("request %s op=%s request_id=%s client_pid=%d waited_ms=%.1f ran_ms=%.1f", *line)

    def _end(self, job: Job, reply: Reply | None, error: XditdError | None) -> None:
        """Answer a job and count it; its line follows in :meth:`log_ended`."""
        error = job.ending or error
        self.queue.remove(job)
        waited_ms, ran_ms = job.waited_s * 1000, job.ran_s * 1000
        if error is None and reply is not None:
            job.move(JobState.DONE)
            self._front.reply(job.session, reply)
            outcome = "done"
        elif error is not None:
            job.move(JobState.FAILED)
            self._front.reply(job.session, failed(job.request.request_id, error))
            outcome = f"failed code={error.code} detail={error.detail[:500]!r}"
        self.accounts.job_ended(job.op, error, waited_ms / 1000, ran_ms / 1000)
        if job.is_image_work:
            self.jobs_done += error is None
            self.jobs_cancelled += isinstance(error, Cancelled)
            self.jobs_failed += error is not None and not isinstance(error, Cancelled)
            if error is None:
                phases: TimingsMs = getattr(reply, "timings_ms", {})
                self.last_job_ms = {**phases, "waited": waited_ms, "ran": ran_ms}
        self._unlogged.append(
            (outcome, job.op, job.request.request_id, job.session.process.pid, waited_ms, ran_ms),
        )

    def _announce_move(self) -> None:
        """Those who wait have moved up: tell them, but not too often."""
        if not self.queue.is_anybody_waiting:
            return
        pause_s = self._announced_s + ANNOUNCE_PAUSE_S - time.monotonic()
        if pause_s <= 0:
            self._announce()
        else:
            self._announce_later(pause_s)

    def _announce(self) -> None:
        self._announced_s = time.monotonic()
        ahead = 1 if self.queue.running else 0
        for position, job in enumerate(self.queue.waiting):
            self._tell_position(job, position + ahead)
        self._announce_later(ANNOUNCE_EVERY_S)

    def _announce_later(self, delay_s: float) -> None:
        """Announce in ``delay_s`` at the latest."""
        timer = self._announce_timer
        if timer is not None and timer.callback is not None:
            if timer.due_s <= time.monotonic() + delay_s:
                return
            timer.cancel()
        self._announce_timer = self._loop.call_later(delay_s, self._announce_due)

    def _announce_due(self) -> None:
        self._announce_timer = None
        if self.queue.is_anybody_waiting:
            self._announce()

    def _tell_position(self, job: Job, ahead: int) -> None:
        event = Queued(request_id=job.request.request_id, ahead=ahead, reason=self._why_waiting())
        self._front.reply(job.session, event)
