"""What a worker group does next: tasks of loans first, then clients' jobs in turn, one command at a time.

A job is taken in by :meth:`Scheduler.submit`, waits in a fair queue, runs as a script of commands, and is answered,
counted and logged when it ends, however that comes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
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
from xditd.ipc.errors import BadRequest, DaemonStopping, Internal, WorkersUnavailable, XditdError, error_for
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import Reply, TimingsMs
from xditd.ipc.replies import Queued, StepDone
from xditd.ipc.requests import InferenceRequest
from xditd.ipc.status import GroupState, JobState
from xditd.ipc.worker_messages import Command, ForgetClient, StepReached, Unmap

logger = logging.getLogger(__name__)

ANNOUNCE_EVERY_S: Final = 5.0
"""How often waiting clients hear where they are, so that silence means something."""

ANNOUNCE_PAUSE_S: Final = 0.1
"""From one announcement to the next. Without it a thousand short jobs a second would tell each of the many that wait a
thousand times, and one that reads slowly would be taken for one that does not read."""


class Scheduler:
    """Own the jobs and the tasks of ``group``. Iterating gives the running job, then the others in turn."""

    def __init__(
        self, loop: EventLoop, group: WorkerGroup, replies: ReplySender, counters: EventCounters, queue: FairQueue
    ) -> None:
        self.queue = queue
        self.running: Job | None = None
        self.last_job_ms: TimingsMs = {}
        self._loop = loop
        self._group = group
        self._replies = replies
        self._counters = counters
        self._is_closed = False
        self._task: Task[Any] | None = None
        self._unmapping: deque[Task[None]] = deque()
        self._mapping: deque[Task[None]] = deque()
        self._announce_timer: Timer | None = None
        self._announced_s = -math.inf
        self._unlogged: list[tuple[object, ...]] = []

    def __iter__(self) -> Iterator[Job]:
        return iter([*([self.running] if self.running is not None else []), *self.queue])

    @property
    def has_task(self) -> bool:
        """Whether something was begun and has not ended."""
        return self._task is not None

    def of_process(self, process: ProcessIdentity) -> list[Job]:
        """One client's jobs, over all its connections."""
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
        """Let a job wait for its turn, whether workers are up yet or not; its client hears so unless the turn is now.

        Raises:
            BadRequest: its request id is in use.
            Busy: the queue is full.
            DaemonStopping: no new work is taken.
            WorkersUnavailable: there will be no workers.
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
            self._tell_position(job, next(place for place, each in enumerate(self) if each is job))
        self._announce_later(ANNOUNCE_EVERY_S)

    def cancel(self, job: Job, why: XditdError) -> None:
        """End a job with ``why``: now if it waits, else as soon as the workers have let go of its memory."""
        if job.state is JobState.QUEUED:
            self._end(job, None, why)
        elif job.ending is None:
            job.ending = why
            job.move(JobState.CANCELLING)
            self._group.cancel_run()

    def cancel_all(self, why: XditdError, are_meant: Callable[[Job], bool] = lambda _: True) -> None:
        """End those jobs that ``are_meant``."""
        for job in self:
            if are_meant(job):
                self.cancel(job, why)

    def close(self, why: DaemonStopping) -> None:
        """Take no more jobs, and end those that wait."""
        self._is_closed = True
        self.cancel_all(why, lambda job: job is not self.running)

    # --- Tasks

    def map_first(self, task: Task[None]) -> None:
        """Run a task of a loan before any job."""
        self._mapping.append(task)

    def unmap_first(self, task: Task[None]) -> None:
        """Run a task before any other: somebody waits to have memory back."""
        self._unmapping.append(task)

    def advance(self) -> None:
        """Start what can be started. The event loop calls this after each round, and nobody else does."""
        while self._is_free:
            tasks = self._unmapping or self._mapping
            task = tasks.popleft() if tasks else self._next_job()
            if task is None:
                return
            self._task = task
            self._resume(task, next)

    def answered(self, command: Command, answers: Answers) -> None:
        """Hand all ranks' answers to the script that waits for them."""
        task = self._task
        if task is None:
            raise Internal(f"{type(command).__name__} was answered, but no task waits")
        failure = first_failure(answers)
        if failure is None:
            self._resume(task, lambda script: script.send(answers))
        elif isinstance(command, (Unmap, ForgetClient)):
            # The rank holds memory that its owner is about to free: only the end of its process returns it.
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

    def group_ended(self, error: XditdError) -> None:
        """End the task that waits for answers which never come, and those of loans: nothing is mapped any more."""
        tasks = [*([self._task] if self._task is not None else []), *self._unmapping, *self._mapping]
        self._task = None
        self._unmapping.clear()
        self._mapping.clear()
        for task in tasks:
            task.script.close()
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
        )

    # --- How jobs end

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

    # --- What waiting clients hear

    def _announce_move(self) -> None:
        """Those who wait have moved up: tell them, but not too often."""
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
                self._tell_position(job, ahead)
        self._announce_later(ANNOUNCE_EVERY_S)

    def _announce_later(self, delay_s: float) -> None:
        """Announce in ``delay_s`` at the latest."""
        timer = self._announce_timer
        if timer is not None and timer.callback is not None:
            if timer.due_s <= time.monotonic() + delay_s:
                return
            timer.cancel()
        self._announce_timer = self._loop.call_later(delay_s, self._announce)

    def _tell_position(self, job: Job, ahead: int) -> None:
        group = self._group
        reason = "other requests go first" if group.is_alive else group.detail or f"workers are {group.state.value}"
        self._replies.reply(job.session, Queued(request_id=job.request.request_id, ahead=ahead, reason=reason))
