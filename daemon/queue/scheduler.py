"""The scheduler: runs mapping tasks of leases first, then clients' jobs in turn, one command at a time.

:meth:`Scheduler.submit` puts a job into the fair queue. It runs as a script of commands, and is answered, counted and
logged when it ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from xditd.daemon.groups.ranks import Answers, CommandMaker, first_failure
from xditd.daemon.groups.worker_group import WorkerGroup
from xditd.daemon.operations.counters import EventCounters
from xditd.daemon.operations.event_loop import EventLoop, Timer
from xditd.daemon.queue.commands import Script, Task
from xditd.daemon.queue.fair_queue import FairQueue
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.routers import ReplySender, failed
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import (
    BadRequest,
    DaemonStopping,
    Internal,
    WorkersLost,
    WorkersUnavailable,
    XditdError,
    error_for,
)
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import Reply, TimingsMs
from xditd.ipc.replies import FramesDecoded, Queued, StepDone
from xditd.ipc.requests import InferenceRequest, Lend
from xditd.ipc.status import GroupState, JobState
from xditd.ipc.worker_messages import Command, ForgetClient, FramesReached, StepReached, Unmap

logger = logging.getLogger(__name__)

ANNOUNCE_EVERY_S: Final = 5.0
"""How often waiting clients are told their position, so that they can detect a daemon that hangs."""

ANNOUNCE_PAUSE_S: Final = 0.1
"""Least time between announcements. With a thousand short jobs a second, every waiting client would get a thousand, and
one that reads slowly would count as unreachable."""


class Scheduler:
    """Own the jobs and tasks of ``group``. Iteration yields the running job, then the others in their order."""

    def __init__(
        self, loop: EventLoop, group: WorkerGroup, replies: ReplySender, counters: EventCounters, queue: FairQueue
    ) -> None:
        self.queue = queue
        self.running: Job | None = None
        self.last_job_ms: TimingsMs = {}
        self.when_idle: Callable[[], Task[Any] | None] = lambda: None
        """Returns a task for workers without any other, if there is one. A job that comes meanwhile waits for it."""
        self._loop = loop
        self._group = group
        self._replies = replies
        self._counters = counters
        self._is_closed = False
        self._task: Task[Any] | None = None
        self._unmapping: deque[Task[None]] = deque()
        self._mapping: deque[Task[None]] = deque()
        self._unreported: list[Callable[[], None]] = []
        self._announce_timer: Timer | None = None
        self._announced_s = -math.inf
        self._unlogged: list[tuple[object, ...]] = []

    def __iter__(self) -> Iterator[Job]:
        return iter([*([self.running] if self.running is not None else []), *self.queue])

    @property
    def has_task(self) -> bool:
        """Whether a task or a job runs."""
        return self._task is not None

    def of_process(self, process: ProcessIdentity) -> list[Job]:
        """Return one client's jobs, over all its sessions."""
        found = self.queue.of_process(process)
        if self.running is not None and self.running.session.process == process:
            found.append(self.running)
        return found

    def find(self, session: Session, request_id: str) -> Job | None:
        for job in self.of_process(session.process):
            if job.session is session and job.request.request_id == request_id:
                return job
        return None

    # --- Jobs

    def submit(self, job: Job) -> None:
        """Queue a job, also while the workers start; its client is told its position unless it can run at once.

        Raises:
            BadRequest: its request id is in use.
            Busy: the queue is full.
            DaemonStopping: the daemon takes no more jobs.
            WorkersUnavailable: the workers were given up.
        """
        if self._is_closed:
            raise DaemonStopping("the daemon is shutting down; send the request to the next one")
        if self._group.state is GroupState.GIVEN_UP:
            raise WorkersUnavailable(f"{self._group.detail}; cure the cause, then restart the daemon")
        if self.find(job.session, job.request.request_id) is not None:
            raise BadRequest(f"request_id {job.request.request_id}: still in use; give every request its own")
        is_next = self._is_free and not (self._unmapping or self._mapping or self.queue)
        self.queue.add(job)
        if not is_next:
            self._send_position(job, next(place for place, each in enumerate(self) if each is job))
        self._announce_later(ANNOUNCE_EVERY_S)

    def cancel(self, job: Job, why: XditdError) -> None:
        """End a job with ``why``: now if it is queued, else as soon as the workers have stopped it."""
        if job.state is JobState.QUEUED:
            self._end(job, None, why)
        elif job.cancel_error is None:
            job.cancel_error = why
            job.move(JobState.CANCELLING)
            self._group.cancel_run()

    def cancel_all(self, why: XditdError, matches: Callable[[Job], bool] = lambda _: True) -> None:
        """Cancel the jobs for which ``matches`` is true."""
        for job in self:
            if matches(job):
                self.cancel(job, why)

    def close(self, why: DaemonStopping) -> None:
        """Refuse further jobs, and end those that wait."""
        self._is_closed = True
        self.cancel_all(why, lambda job: job is not self.running)

    # --- Tasks

    def map_first(self, task: Task[None]) -> None:
        """Run a mapping task before any job."""
        self._mapping.append(task)

    def unmap_first(self, task: Task[None]) -> None:
        """Run an unmapping task before any other: a client waits to free its memory.

        Unless the group is alive the task fails, since nothing is mapped: at once, or once the processes of an ended
        group are gone.
        """
        if self._group.is_alive:
            self._unmapping.append(task)
        else:
            self._fail(task, WorkersLost(self._group.detail))

    def advance(self) -> None:
        """Start the next task or job if the workers are idle; called after each round of the event loop."""
        while self._is_free:
            tasks = self._unmapping or self._mapping
            task = tasks.popleft() if tasks else self._next_job()
            if task is None and not self._is_closed:
                task = self.when_idle()
            if task is None:
                return
            self._task = task
            self._resume(task, next)

    def answered(self, command: Command, answers: Answers) -> None:
        """Pass all ranks' answers to the script that waits for them."""
        task = self._task
        if task is None:
            raise Internal(f"{type(command).__name__} was answered, but no task waits")
        failure = first_failure(answers)
        if failure is None:
            self._resume(task, lambda script: script.send(answers))
        elif isinstance(command, (Unmap, ForgetClient)):
            # The rank still maps memory that its owner is about to free: only the end of the rank unmaps it.
            self._group.end(Internal(f"rank {failure.rank} could not unmap: {failure.detail}"))
        else:
            error = error_for(failure.code, failure.detail, names=failure.names)
            self._resume(task, lambda script: script.throw(error))

    def step_reached(self, step: StepReached) -> None:
        job = self.running
        if job is not None:
            job.step, job.total_steps = step.step, step.total_steps
            self._counters.step_reached(step)
            event = StepDone(
                request_id=job.request.request_id,
                step=step.step,
                total_steps=step.total_steps,
                elapsed_s=step.elapsed_s,
            )
            self._replies.reply(job.session, event)

    def frames_reached(self, reached: FramesReached) -> None:
        job = self.running
        if job is not None:
            event = FramesDecoded(
                request_id=job.request.request_id,
                frames=reached.frames,
                total_frames=reached.total_frames,
                elapsed_s=reached.elapsed_s,
            )
            self._replies.reply(job.session, event)

    def group_ended(self, error: XditdError) -> None:
        """Fail the running task and all mapping and unmapping tasks."""
        tasks = [*([self._task] if self._task is not None else []), *self._unmapping, *self._mapping]
        self._task = None
        self._unmapping.clear()
        self._mapping.clear()
        for task in tasks:
            self._fail(task, error)

    def processes_ended(self) -> None:
        """Report the failures that had to wait until no process of the group maps anything."""
        unreported, self._unreported = self._unreported, []
        for report in unreported:
            report()

    def _fail(self, task: Task[Any], error: XditdError) -> None:
        task.script.close()
        if task.frees_memory and self._group.is_ending:
            self._unreported.append(partial(task.on_failed, error))
        else:
            task.on_failed(error)

    @property
    def _is_free(self) -> bool:
        """Whether a new task would start at once."""
        return self._task is None and self._group.is_idle

    def _resume(self, task: Task[Any], resume: Callable[[Script[Any]], CommandMaker]) -> None:
        try:
            make = resume(task.script)
        except StopIteration as end:
            self._task = None
            task.on_done(end.value)
        except XditdError as error:
            self._task = None
            task.on_failed(error)
        else:
            self._group.send(make)

    def _next_job(self) -> Task[Reply] | None:
        job = self.queue.take()
        if job is None:
            return None
        self.running = job
        job.move(JobState.RUNNING)
        job.started_s = time.monotonic()
        self._announce_move()
        return Task(
            job.write_script(job),
            on_done=lambda reply: self._end(job, reply, None),
            on_failed=lambda error: self._end(job, None, error),
            frees_memory=isinstance(job.request, Lend),
        )

    # --- The end of a job

    def log_ended(self) -> None:
        """Log the jobs that have ended.

        Called after their replies were sent, which need not wait for it, but in the same round of the loop: a client
        that has read its reply finds the line in the log.
        """
        unlogged, self._unlogged = self._unlogged, []
        for line in unlogged:
            logger.info("request %s op=%s request_id=%s client_pid=%d waited_ms=%.1f ran_ms=%.1f", *line)

    def _end(self, job: Job, reply: Reply | None, error: XditdError | None) -> None:
        """Answer a job and count it; :meth:`log_ended` logs it."""
        error = job.cancel_error or error
        waited_s, ran_s = job.waited_s, job.ran_s
        if job is self.running:
            self.running = None
            self.queue.note_duration(ran_s)
        else:
            self.queue.remove(job)
        if error is None and reply is not None:
            job.move(JobState.DONE)
            self._replies.reply(job.session, reply)
            outcome = "done"
            if isinstance(job.request, InferenceRequest):
                phases: TimingsMs = getattr(reply, "timings_ms", {})
                self.last_job_ms = {**phases, "waited": waited_s * 1000, "ran": ran_s * 1000}
        elif error is not None:
            job.move(JobState.FAILED)
            self._replies.reply(job.session, failed(job.request.request_id, error))
            outcome = f"failed code={error.code} detail={error.detail[:500]!r}"
        self._counters.job_ended(job.op, error, waited_s, ran_s)
        self._unlogged.append(
            (outcome, job.op, job.request.request_id, job.session.process.pid, waited_s * 1000, ran_s * 1000)
        )

    # --- Queue positions for waiting clients

    def _announce_move(self) -> None:
        """Announce that the queue has moved, at most every :data:`ANNOUNCE_PAUSE_S`."""
        pause_s = self._announced_s + ANNOUNCE_PAUSE_S - time.monotonic()
        if pause_s <= 0:
            self._announce()
        elif self.queue:
            self._announce_later(pause_s)

    def _announce(self) -> None:
        if not self.queue:
            return
        self._announced_s = time.monotonic()
        for ahead, job in enumerate(self):
            if job is not self.running:
                self._send_position(job, ahead)
        self._announce_later(ANNOUNCE_EVERY_S)

    def _announce_later(self, delay_s: float) -> None:
        """Announce within ``delay_s``."""
        timer = self._announce_timer
        if timer is not None and timer.callback is not None:
            if timer.due_s <= time.monotonic() + delay_s:
                return
            timer.cancel()
        self._announce_timer = self._loop.call_later(delay_s, self._announce)

    def _send_position(self, job: Job, ahead: int) -> None:
        group = self._group
        reason = "other requests go first" if group.is_alive else group.detail or f"workers are {group.state.value}"
        self._replies.reply(job.session, Queued(request_id=job.request.request_id, ahead=ahead, reason=reason))
