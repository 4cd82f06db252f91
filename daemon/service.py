"""The daemon's parts put together, and what happens between them: group events, ended sessions, the end of it all."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import zmq

from xditd.daemon.accounts import Accounts
from xditd.daemon.configuration import Configuration
from xditd.daemon.desk import Desk
from xditd.daemon.folder_watch import FolderWatch
from xditd.daemon.front import Front
from xditd.daemon.group import first_failure
from xditd.daemon.jobs import Job, JobQueue
from xditd.daemon.loans import Loans
from xditd.daemon.logbook import Logbook
from xditd.daemon.loop import Loop
from xditd.daemon.notify import Notifier
from xditd.daemon.peers import Peer
from xditd.daemon.quotas import Quotas
from xditd.daemon.routers import Router
from xditd.daemon.runtime_folder import RuntimeFolder
from xditd.daemon.sequence import Errand, ErrandRunner
from xditd.daemon.sessions import Session, Sessions
from xditd.daemon.supervisor import Supervisor
from xditd.daemon.vitals import Vitals
from xditd.ipc.errors import DaemonStopping, LeaseLost, WorkersUnavailable, XditdError
from xditd.ipc.status import GroupState
from xditd.ipc.worker_messages import Answer, Command, FilesDigested, Run, StepReached

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

Callback = Callable[[], None]


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
        logbook: Logbook,
        notifier: Notifier,
    ) -> None:
        self.configuration = configuration
        self.quotas = Quotas.of(configuration)
        self.logbook = logbook
        self.loop = Loop()
        self.accounts = Accounts()
        self.started_s = time.monotonic()
        self.is_stopping = False
        self.snapshot: msgspec.Raw | None = None
        """The state in the form in which it is sent, until anything may have changed."""
        self.failure: XditdError | None = None
        """Why the daemon ends although nobody told it to."""
        self._is_shutting_down = False
        self._folder = folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._worker_router = Router(self._context, folder.runtime.worker_socket)
        self.client_router = Router(self._context, folder.runtime.client_socket)
        self.sessions = Sessions(self.loop)
        self.front = Front(self.client_router, self.sessions)
        self.supervisor = Supervisor(self.loop, self._worker_router, configuration, environment, logbook)
        self.supervisor.listener = self
        self.runner = ErrandRunner(self.supervisor, self._next_errand)
        self.desk = Desk(
            self.loop,
            self.front,
            JobQueue(configuration.queue_limit, configuration.client_queue_limit),
            interrupt=self.supervisor.cancel_run,
            why_waiting=self._why_waiting,
            accounts=self.accounts,
        )
        self.loans = Loans(self.desk, lambda: self.supervisor.is_alive)
        self.vitals = Vitals(self.loop, notifier, lambda: self.supervisor.overdue_s)
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
        self.supervisor.start()
        self.vitals.begin(self.supervisor.detail)
        self._check_beats()
        self.loop.run(self._after_round)

    def close(self) -> None:
        """Close the sockets; workers that are left, after a defect, are killed."""
        self.supervisor.kill()
        self._worker_router.close(0)
        self.front.close(_LINGER_MS)
        self.desk.log_ended()
        self._context.term()
        self.loop.close()

    # --- What handlers ask for -----------------------------------------------------------------------

    def open_session(self, routing_id: bytes, address: str, peer: Peer, client_name: str) -> Session:
        """Open a session that ends with its process at the latest."""
        session = self.sessions.open(routing_id, address, peer, client_name)
        self.loop.watch(session.pidfd, lambda: self.end_session(session, PROCESS_EXITED))
        return session

    def end_session(self, session: Session, why: str, then: Callback = lambda: None) -> None:
        """End a session, its jobs and its loans; ``then`` is called once no worker maps anything of it."""
        if not self.sessions.close(session):
            return
        lost = LeaseLost(f"the client (pid {session.process.pid}) is gone: {why}")
        leases = self.loans.registry.of_session(session)
        # One that only looked, and left, has no line: at INFO those of a monitor would push out all others.
        level = logging.DEBUG if why in USUAL_ENDS and not leases else logging.INFO
        logger.log(level, "session ended client_pid=%d loans=%d: %s", session.process.pid, len(leases), why)
        self.desk.cancel_session(session, lost)
        self.loans.end_all(leases, lost, then)
        if session.has_io:
            if (other := self.sessions.of_process(session.process)) is not None:
                other.has_io = True
            else:
                self.loans.forget(session.process)

    def submit(self, job: Job) -> None:
        """Queue a request for the workers, whether they are up yet or not.

        Raises:
            BadRequest: its request id is in use.
            Busy: the queue is full.
            DaemonStopping: no new work is taken.
            WorkersUnavailable: there will be no workers.
        """
        if self.is_stopping:
            raise DaemonStopping("the daemon is shutting down; send the request to the next one")
        if self.supervisor.state is GroupState.GIVEN_UP:
            raise WorkersUnavailable(f"{self.supervisor.detail}; cure the cause, then restart the daemon")
        is_next = self.runner.is_idle and not self.loans.has_chores and not self.desk.queue.is_anybody_waiting
        self.desk.submit(job, will_wait=not is_next)

    def stop(self, why: str) -> None:
        """Take no new work, let what runs finish within its deadline, shut the workers down, and leave the loop."""
        if self.is_stopping:
            return
        self.is_stopping = True
        stopping = DaemonStopping(f"the daemon is shutting down: {why}")
        deadline_s = self.configuration.drain_deadline_s
        running = self.desk.queue.running
        logger.info("stopping: %s%s", why, f"; a job may run on for {deadline_s:g} s" if running is not None else "")
        self.vitals.end(f"stopping: {why}")
        for job in self.desk.queue.waiting:
            self.desk.cancel(job, stopping)
        self.loop.deadline(deadline_s, lambda: self._end_drain(stopping))

    def fail(self, error: XditdError) -> None:
        """Stop because the daemon cannot go on: like :meth:`stop`, and it ends with this error."""
        self.failure = error
        self.stop(error.detail)

    # --- What the group tells ------------------------------------------------------------------------

    def group_ready(self) -> None:
        """Only say so: the round ends with the next errand, and replays come first."""
        self.vitals.say(f"{self.supervisor.expected_world_size} workers ready")

    def group_ended(self, error: XditdError) -> None:
        if not self.is_stopping:
            self.accounts.note_error("workers", error)
            self.vitals.say(f"workers lost, to be rebuilt: {error.detail}")
        self.runner.group_ended(_as_seen_by_a_job(error))
        self.loans.group_ended()

    def group_given_up(self, error: WorkersUnavailable) -> None:
        self.accounts.note_error("workers", error)
        self.vitals.say(f"degraded, no workers: {error.detail}")
        self.desk.cancel_all(error)
        lost = LeaseLost(f"the workers are gone for good: {error.detail}")
        self.loans.end_all(list(self.loans.registry), lost, lambda: None)

    def answered(self, command: Command, answers: Sequence[Answer]) -> None:
        self.runner.answered(command, answers)
        if isinstance(command, Run) and first_failure(answers) is None:
            self.supervisor.restarts.note_served()

    def step_reached(self, step: StepReached) -> None:
        self.desk.step_reached(step)

    def files_digested(self, report: FilesDigested) -> None:
        self.loans.registry.note_digests(report.component_id, report.digests)

    # --- Between rounds ------------------------------------------------------------------------------

    def _after_round(self) -> None:
        self.runner.advance()
        self.front.flush()
        while self.front.unreachable:
            self._close_unreachable()
            self.runner.advance()
            self.front.flush()
        self.desk.log_ended()
        if self.is_stopping and self.runner.current is None:
            self._shut_down()

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
        unreachable, self.front.unreachable = self.front.unreachable, {}
        for routing_id, why in unreachable.items():
            session = self.sessions.find(routing_id)
            if session is not None:
                self.end_session(session, why)

    def _next_errand(self) -> Errand[Any] | None:
        return self.loans.next_errand() or self.desk.next_errand()

    def _end_drain(self, stopping: DaemonStopping) -> None:
        self.desk.cancel_all(stopping)
        self.loop.deadline(CANCEL_GRACE_S, self._shut_down)

    def _shut_down(self) -> None:
        if not self._is_shutting_down:
            self._is_shutting_down = True
            self.supervisor.shut_down(self.loop.stop)

    def _why_waiting(self) -> str:
        if self.supervisor.is_alive:
            return "other requests go first"
        return self.supervisor.detail or f"workers are {self.supervisor.state.value}"


def _as_seen_by_a_job(error: XditdError) -> XditdError:
    """Add what its client may do to what happened to the group."""
    return type(error)(
        f"{error.detail}; the worker group is being rebuilt, and the same request may be sent again"
        if error.retryable
        else f"{error.detail}; the worker group is being rebuilt"
    )
