"""The daemon's parts put together, and what happens between them: group events, ended sessions, the end of it all."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import zmq

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.quotas import Quotas
from xditd.daemon.groups.ranks import ReportReader
from xditd.daemon.groups.worker_group import WorkerGroup
from xditd.daemon.loans.lending import Loans
from xditd.daemon.operations.counters import EventCounters
from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.log_buffer import LogBuffer
from xditd.daemon.operations.runtime_folder import FolderWatch, RuntimeFolder
from xditd.daemon.operations.service_manager import ServiceManager
from xditd.daemon.queue.fair_queue import FairQueue
from xditd.daemon.queue.scheduler import Scheduler
from xditd.daemon.sockets.credentials import Credentials
from xditd.daemon.sockets.routers import ReplySender, Router
from xditd.daemon.sockets.sessions import Session, Sessions
from xditd.ipc.errors import DaemonStopping, LeaseLost, WorkersUnavailable, XditdError
from xditd.ipc.worker_messages import Answer, Command, FilesDigested, StepReached

logger = logging.getLogger(__name__)

CANCEL_GRACE_S: Final = 5.0
"""How long a job that used up its time to drain may take to notice its cancel. Its next step is enough."""

SAID_GOODBYE: Final = "it said goodbye"
PROCESS_EXITED: Final = "its process has exited"
USUAL_ENDS: Final = (SAID_GOODBYE, PROCESS_EXITED)
"""Of a session; any other is the daemon's doing."""

BEATS: Final = 4
"""Signs of life within the time after which a silent client is given up: some may come late."""

_LINGER_MS: Final = 300
"""For last replies to leave; a client that does not read holds the daemon no longer than this."""


class Service:
    """Everything that serves requests. Handlers use its parts; it is the group's listener.

    :meth:`listen` comes first, and :meth:`run` starts the group: hello is answered while the workers import their
    libraries.
    """

    def __init__(
        self,
        configuration: Configuration,
        folder: RuntimeFolder,
        environment: Mapping[str, str],
        log_buffer: LogBuffer,
        service_manager: ServiceManager,
    ) -> None:
        self.configuration = configuration
        self.quotas = Quotas.of(configuration)
        self.log_buffer = log_buffer
        self.loop = EventLoop()
        self.counters = EventCounters()
        self.started_s = time.monotonic()
        self.failure: XditdError | None = None
        """Why the daemon ends although nobody told it to."""
        self._is_stopping = False
        self._is_shutting_down = False
        self._folder = folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._worker_router = Router(self._context, folder.runtime.worker_socket)
        self.client_router = Router(self._context, folder.runtime.client_socket)
        self.sessions = Sessions(self.loop)
        self.replies = ReplySender(self.client_router, self.sessions)
        reader = ReportReader(self.loop, self._worker_router)
        self.group = WorkerGroup(
            "worker group", self.loop, self._worker_router, reader, configuration, environment, log_buffer
        )
        self.group.listener = self
        queue = FairQueue(configuration.queue_limit, configuration.client_queue_limit)
        self.scheduler = Scheduler(self.loop, self.group, self.replies, self.counters, queue)
        self.loans = Loans(self.group, self.scheduler, self.counters)
        self._service_manager = service_manager
        self._folder_watch = FolderWatch(self.loop, folder, self.fail)

    def listen(self, client_listener: socket.socket | None) -> None:
        """Open the sockets of the runtime folder; the clients' is ``client_listener`` where a service manager made one.

        Raises:
            AlreadyRunning: another process listens there.
            StorageError: a socket cannot be made.
        """
        runtime = self._folder.runtime
        self._folder.listen(runtime.worker_socket, self._worker_router.listen)
        if client_listener is None:
            self._folder.listen(runtime.client_socket, self.client_router.listen)
        else:
            self._folder.await_clients_at(runtime.client_socket)
            self.client_router.listen(client_listener)

    def run(self) -> None:
        """Start the group and serve until :meth:`stop`."""
        self._folder_watch.begin()
        self.group.start()
        self._service_manager.begin(self.loop, self.group.detail, lambda: self.group.overdue_s)
        self._check_beats()
        self.loop.run(self._after_round)

    def close(self) -> None:
        """Close the sockets; workers that are left, after a defect, are killed."""
        self.group.kill()
        self._worker_router.close(0)
        self.replies.close(_LINGER_MS)
        self.scheduler.log_ended()
        self._context.term()
        self.loop.close()

    # --- Sessions ------------------------------------------------------------------------------------

    def open_session(self, routing_id: bytes, address: str, peer: Credentials, client_name: str) -> Session:
        """Open a session that ends with its process at the latest."""
        session = self.sessions.open(routing_id, address, peer, client_name)
        self.loop.watch(session.pidfd, lambda: self.end_session(session, PROCESS_EXITED))
        return session

    def end_session(self, session: Session, why: str, then: Callable[[], None] = lambda: None) -> None:
        """End a session, its jobs and its leases; ``then`` is called once no worker maps anything of it."""
        if not self.sessions.close(session):
            return
        lost = LeaseLost(f"the client (pid {session.process.pid}) is gone: {why}")
        leases = self.loans.leases.of_session(session)
        # One that only looked, and left, has no line: at INFO those of a monitor would push out all others.
        level = logging.DEBUG if why in USUAL_ENDS and not leases else logging.INFO
        logger.log(level, "session ended client_pid=%d loans=%d: %s", session.process.pid, len(leases), why)
        self.scheduler.cancel_all(lost, lambda job: job.session is session)
        self.loans.end_all(leases, lost, then)
        if session.has_io:
            if (other := self.sessions.of_process(session.process)) is not None:
                other.has_io = True
            else:
                self.loans.forget(session.process)

    def _check_beats(self) -> None:
        """End the sessions of clients that are there but say nothing: a stopped one must not hold memory for ever."""
        deadline_s = self.configuration.client_deadline_s
        for session in self.sessions:
            silent_s = self.loop.clock.waited_s(session.heard_s)
            if silent_s >= deadline_s:
                why = f"no sign of life for {silent_s:.1f} s (client_deadline_s {deadline_s:g})"
                self.end_session(session, why)
        self.loop.call_later(deadline_s / BEATS, self._check_beats)

    def _close_unreachable(self) -> None:
        unreachable, self.replies.unreachable = self.replies.unreachable, {}
        for routing_id, why in unreachable.items():
            session = self.sessions.find(routing_id)
            if session is not None:
                self.end_session(session, why)

    # --- What the group tells ------------------------------------------------------------------------

    def group_ready(self) -> None:
        """Only say so: the round ends with the next task, and mapping again comes first."""
        self._service_manager.status(f"{self.group.expected_world_size} workers ready")

    def group_ended(self, error: XditdError) -> None:
        if not self._is_stopping:
            self.counters.note_error("workers", error)
            self._service_manager.status(f"workers lost, to be rebuilt: {error.detail}")
        self.scheduler.group_ended(_as_seen_by_a_job(error))
        self.loans.group_ended()

    def group_given_up(self, error: WorkersUnavailable) -> None:
        self.counters.note_error("workers", error)
        self._service_manager.status(f"degraded, no workers: {error.detail}")
        self.scheduler.cancel_all(error)
        lost = LeaseLost(f"the workers are gone for good: {error.detail}")
        self.loans.end_all(list(self.loans.leases), lost, lambda: None)

    def answered(self, command: Command, answers: Sequence[Answer]) -> None:
        self.scheduler.answered(command, answers)

    def step_reached(self, step: StepReached) -> None:
        self.scheduler.step_reached(step)

    def files_digested(self, report: FilesDigested) -> None:
        self.loans.leases.note_digests(report.component_id, report.digests)

    # --- Between rounds, and the end -----------------------------------------------------------------

    def _after_round(self) -> None:
        self.scheduler.advance()
        self.replies.flush()
        while self.replies.unreachable:
            self._close_unreachable()
            self.scheduler.advance()
            self.replies.flush()
        self.scheduler.log_ended()
        if self._is_stopping and not self.scheduler.has_task:
            self._shut_down()

    def stop(self, why: str) -> None:
        """Take no new work, let what runs finish within its deadline, shut the workers down, and leave the loop."""
        if self._is_stopping:
            return
        self._is_stopping = True
        stopping = DaemonStopping(f"the daemon is shutting down: {why}")
        deadline_s = self.configuration.drain_deadline_s
        may_run_on = f"; a job may run on for {deadline_s:g} s" if self.scheduler.running is not None else ""
        logger.info("stopping: %s%s", why, may_run_on)
        self._service_manager.stopping(f"stopping: {why}")
        self.scheduler.close(stopping)
        self.loop.deadline(deadline_s, lambda: self._end_drain(stopping))

    def fail(self, error: XditdError) -> None:
        """Stop because the daemon cannot go on: like :meth:`stop`, and it ends with this error."""
        self.failure = error
        self.stop(error.detail)

    def _end_drain(self, stopping: DaemonStopping) -> None:
        self.scheduler.cancel_all(stopping)
        self.loop.deadline(CANCEL_GRACE_S, self._shut_down)

    def _shut_down(self) -> None:
        if not self._is_shutting_down:
            self._is_shutting_down = True
            self.group.shut_down(self.loop.stop)


def _as_seen_by_a_job(error: XditdError) -> XditdError:
    """Add what its client may do to what happened to the group."""
    return type(error)(
        f"{error.detail}; the worker group is being rebuilt, and the same request may be sent again"
        if error.retryable
        else f"{error.detail}; the worker group is being rebuilt"
    )
