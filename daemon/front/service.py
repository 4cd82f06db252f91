"""The daemon's service: builds its parts and connects them (worker group events, ended sessions, shutdown)."""

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
from xditd.daemon.loans.announcements import Announcements
from xditd.daemon.loans.lending import Lending
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
from xditd.ipc.codec import report_decoder, request_decoder
from xditd.ipc.errors import DaemonStopping, LeaseLost, WorkersUnavailable, XditdError
from xditd.ipc.worker_messages import Answer, Command, FilesDigested, FramesReached, StepReached

logger = logging.getLogger(__name__)

CANCEL_GRACE_S: Final = 5.0
"""From the cancel of a job that exceeded ``drain_deadline_s`` to the end of its workers. One step is enough."""

SAID_GOODBYE: Final = "it said goodbye"
PROCESS_EXITED: Final = "its process has exited"
CLIENT_END_REASONS: Final = (SAID_GOODBYE, PROCESS_EXITED)
"""A session that ends for another reason was ended by the daemon."""

BEATS: Final = 4
"""Heartbeats that a client sends within ``client_deadline_s``, so that some may come late."""

WARM_UP_S: Final = 0.5
"""From the start of the loop to the analysis of all messages, which takes 15 ms: workers still import then."""

_LINGER_MS: Final = 300
"""ZMQ_LINGER: how long the daemon waits at its end for clients to read their last replies."""


class Service:
    """Build the daemon's parts, which the handlers use, and handle the worker group's events.

    Call :meth:`listen` before :meth:`run`, which starts the group: clients are answered while the workers start.
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
        """The error that ended the daemon, if nobody stopped it."""
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
        self.lending = Lending(self.group, self.scheduler, self.counters)
        self.announcements = Announcements(self.loop.call_later)
        self.scheduler.when_idle = self.announcements.take
        self._service_manager = service_manager
        self._folder_watch = FolderWatch(self.loop, folder, self.fail)

    def listen(self, client_listener: socket.socket | None) -> None:
        """Open the workers' socket and the clients'; a service manager may have made the latter, ``client_listener``.

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
        self.loop.call_later(WARM_UP_S, _warm_up)
        self.loop.run(self._after_round)

    def close(self) -> None:
        """Close the sockets, and kill workers that still run (only after an unexpected error)."""
        self.group.kill()
        self._worker_router.close(0)
        self.replies.close(_LINGER_MS)
        self.scheduler.log_ended()
        self._context.term()
        self.loop.close()

    # --- Sessions ------------------------------------------------------------------------------------

    def open_session(self, routing_id: bytes, address: str, peer: Credentials, client_name: str) -> Session:
        """Open a session, which ends when its process exits, if not earlier."""
        session = self.sessions.open(routing_id, address, peer, client_name)
        self.loop.watch(session.pidfd, lambda: self.end_session(session, PROCESS_EXITED))
        return session

    def end_session(self, session: Session, why: str, then: Callable[[], None] = lambda: None) -> None:
        """End a session, its jobs and its leases; ``then`` is called once no worker maps the client's memory."""
        if not self.sessions.close(session):
            return
        lost = LeaseLost(f"the client (pid {session.process.pid}) is gone: {why}")
        leases = self.lending.leases.of_session(session)
        # DEBUG for a client that only monitored: at INFO its lines would replace all others in the log buffer.
        level = logging.DEBUG if why in CLIENT_END_REASONS and not leases else logging.INFO
        logger.log(level, "session ended client_pid=%d loans=%d: %s", session.process.pid, len(leases), why)
        self.announcements.forget(session)
        self.scheduler.cancel_all(lost, lambda job: job.session is session)
        other = self.sessions.of_process(session.process)
        if other is not None:
            other.has_io = other.has_io or session.has_io
            other.has_device_io = other.has_device_io or session.has_device_io
        forgets = session.has_io and other is None
        if forgets and session.has_device_io:
            # The process frees its device memory next, which no worker may map then. Host memory may be freed before.
            self.lending.end_all(leases, lost, lambda: self.lending.forget(session.process, then))
            return
        self.lending.end_all(leases, lost, then)
        if forgets:
            self.lending.forget(session.process, lambda: None)

    def _check_beats(self) -> None:
        """End sessions without heartbeats: a client that is stopped (SIGSTOP) must not hold memory for ever."""
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

    # --- Events of the worker group ------------------------------------------------------------------

    def group_ready(self) -> None:
        """Report the state; the scheduler starts the next task at the end of the round."""
        self._service_manager.status(f"{self.group.expected_world_size} workers ready")

    def group_ended(self, error: XditdError) -> None:
        if not self._is_stopping:
            self.counters.note_error("workers", error)
            self._service_manager.status(f"workers lost, to be rebuilt: {error.detail}")
        self.scheduler.group_ended(_with_retry_advice(error))
        self.lending.group_ended()

    def processes_ended(self) -> None:
        self.scheduler.processes_ended()

    def group_given_up(self, error: WorkersUnavailable) -> None:
        self.counters.note_error("workers", error)
        self._service_manager.status(f"degraded, no workers: {error.detail}")
        self.scheduler.cancel_all(error)
        lost = LeaseLost(f"the workers ended and are not restarted: {error.detail}")
        self.lending.end_all(list(self.lending.leases), lost, lambda: None)

    def answered(self, command: Command, answers: Sequence[Answer]) -> None:
        self.scheduler.answered(command, answers)

    def step_reached(self, step: StepReached) -> None:
        self.scheduler.step_reached(step)

    def frames_reached(self, reached: FramesReached) -> None:
        self.scheduler.frames_reached(reached)

    def files_digested(self, report: FilesDigested) -> None:
        self.lending.leases.note_digests(report.component_id, report.digests)

    # --- After each round of the loop, and shutdown --------------------------------------------------

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
        """Refuse new jobs, let the running one finish within ``drain_deadline_s``, end the workers, leave the loop."""
        if self._is_stopping:
            return
        self._is_stopping = True
        stopping = DaemonStopping(f"the daemon is shutting down: {why}")
        deadline_s = self.configuration.drain_deadline_s
        drain = f"; the running job has {deadline_s:g} s to finish" if self.scheduler.running is not None else ""
        logger.info("stopping: %s%s", why, drain)
        self._service_manager.stopping(f"stopping: {why}")
        self.scheduler.close(stopping)
        self.loop.deadline(deadline_s, lambda: self._end_drain(stopping))

    def fail(self, error: XditdError) -> None:
        """Stop because of an error, which becomes :attr:`failure`."""
        self.failure = error
        self.stop(error.detail)

    def _end_drain(self, stopping: DaemonStopping) -> None:
        self.scheduler.cancel_all(stopping)
        self.loop.deadline(CANCEL_GRACE_S, self._shut_down)

    def _shut_down(self) -> None:
        if not self._is_shutting_down:
            self._is_shutting_down = True
            self.group.shut_down(self.loop.stop)


def _warm_up() -> None:
    request_decoder.warm_up()
    report_decoder.warm_up()


def _with_retry_advice(error: XditdError) -> XditdError:
    """Add to a group's error what the client of a failed job can do."""
    return type(error)(
        f"{error.detail}; the worker group is being rebuilt, and the same request may be sent again"
        if error.retryable
        else f"{error.detail}; the worker group is being rebuilt"
    )
