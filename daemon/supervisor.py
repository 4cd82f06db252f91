"""The worker group's lives, one after the other: start, watch, end, and start again within bounds."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.group import CommandMaker, Group, first_failure
from xditd.daemon.leader import Leader, leader_command
from xditd.daemon.listeners import GroupListener
from xditd.daemon.logbook import Logbook
from xditd.daemon.loop import Callback, Deadline, Loop, Timer
from xditd.daemon.paces import Paces
from xditd.daemon.peers import check_uid
from xditd.daemon.progress import CommandWatch, ProgressWatch
from xditd.daemon.restarts import RestartBudget
from xditd.daemon.routers import Envelope, Router
from xditd.daemon.states import GROUP_NEXT, move
from xditd.daemon.worker_output import WorkerOutput
from xditd.ipc.codec import report_decoder
from xditd.ipc.errors import (
    BadMessage,
    Internal,
    NotPermitted,
    WorkersLost,
    WorkersUnavailable,
    XditdError,
    error_for,
)
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors
from xditd.ipc.status import GroupState
from xditd.ipc.worker_messages import (
    Answer,
    CancelRun,
    FilesDigested,
    RankFailed,
    RankReady,
    Report,
    Run,
    Shutdown,
    StepReached,
)

logger = logging.getLogger(__name__)

SHUTDOWN_GRACE_S: Final = 5.0
"""From Shutdown to SIGTERM: unmapping takes well under a second."""

_PASSING: Final = (errno.EAGAIN, errno.ENOMEM)
"""Why a process could not be started now, and may be later; anything else stays as it is."""


class Supervisor:
    """Own the group's processes and the socket to its ranks.

    ``ready`` means that every rank has answered, not that its process exists. A life ends as a whole: a dead leader,
    a rank that is out of step, a missed deadline. ``listener`` is set once, before :meth:`start`.
    """

    listener: GroupListener

    def __init__(
        self,
        loop: Loop,
        router: Router,
        configuration: Configuration,
        environment: Mapping[str, str],
        logbook: Logbook,
    ) -> None:
        self.state = GroupState.DEAD
        self.detail = "not started yet"
        self.group: Group | None = None
        self.starts = 0
        self.restarts = RestartBudget(configuration.max_restarts)
        self.outside_connections_before = 0
        """What the ranks of earlier lives had attempted."""
        self._loop = loop
        self._router = router
        self._configuration = configuration
        self._environment = environment
        self._logbook = logbook
        self._leader: Leader | None = None
        self._is_ended_by_us = False
        self._started_s = 0.0
        self._ready_s: float | None = None
        self._start_deadline: Deadline | None = None
        self._restart_timer: Timer | None = None
        self._on_stopped: Callback | None = None
        silence = ProgressWatch(loop, lambda: self.state is GroupState.BUSY, self._fell_silent)
        self._progress = CommandWatch(Paces.of(configuration, loop.clock), silence)
        loop.watch_socket(router.socket, self._read_reports)

    @property
    def is_idle(self) -> bool:
        return self.state is GroupState.READY

    @property
    def is_alive(self) -> bool:
        """Whether the ranks may have something mapped, and can be asked to unmap it."""
        return self.state in (GroupState.READY, GroupState.BUSY)

    @property
    def expected_world_size(self) -> int:
        """How many ranks there are, or will be; 0 while nobody knows."""
        if self.group is not None and self.group.world_size:
            return self.group.world_size
        return self._configuration.workers if isinstance(self._configuration.workers, int) else 0

    @property
    def overdue_s(self) -> float:
        """How long the group has been silent beyond the deadline that ends it."""
        return self._progress.overdue_s

    def start(self) -> None:
        """Begin a life."""
        self.state = move(GROUP_NEXT, self.state, GroupState.STARTING)
        self.detail = "workers are starting" if self.starts == 0 else f"workers are being rebuilt: {self.detail}"
        self.starts += 1
        self._started_s = self._loop.clock.now_s()
        self._ready_s = None
        self._is_ended_by_us = False
        token = os.urandom(16).hex()
        self.group = Group(self._router, token)
        command = leader_command(self._configuration, token)
        try:
            self._leader = Leader(self._loop, self._logbook, command, self._environment, self._leader_gone)
        except OSError as error:
            self._could_not_start(command[0], error)
            return
        self._start_deadline = self._loop.deadline(self._configuration.start_deadline_s, self._start_overdue)
        logger.info("worker group starting leader_pid=%d start=%d", self._leader.pid, self.starts)

    def tell(self, make: CommandMaker) -> None:
        """Send the next command to every rank; the listener gets the answers, or the end of the group."""
        group = self._live_group()
        self.state = move(GROUP_NEXT, self.state, GroupState.BUSY)
        command, is_sent = group.tell(make)
        self._progress.begin(command)
        if not is_sent:
            self.end(WorkersLost("a rank does not read its commands, or has closed its connection"))

    def cancel_run(self) -> None:
        """Ask the ranks to stop the job that they run, if they run one."""
        group = self.group
        if group is not None and group.in_flight is not None and isinstance(group.in_flight.command, Run):
            target = group.in_flight.command.op_number
            group.interject(lambda number: CancelRun(op_number=number, target_op_number=target))
            self._progress.told_to_stop()

    def end(self, error: XditdError) -> None:
        """End this life because of ``error``; another one follows within the bounds."""
        if self.state in (GroupState.DEAD, GroupState.GIVEN_UP):
            return
        self._is_ended_by_us = True
        self._mark_dead(error)
        if self._leader is not None:
            self._leader.terminate()

    def shut_down(self, on_stopped: Callback) -> None:
        """End the group for good, in order if it can; ``on_stopped`` is called once its processes are gone."""
        self._on_stopped = on_stopped
        if self._restart_timer is not None:
            self._restart_timer.cancel()
        leader = self._leader
        if leader is None:
            on_stopped()
        elif self.is_idle and self._live_group().interject(lambda number: Shutdown(op_number=number)):
            self._mark_dead(WorkersLost("the daemon is stopping"))
            self._loop.deadline(SHUTDOWN_GRACE_S, leader.terminate)
        else:
            self.end(WorkersLost("the daemon is stopping"))

    def kill(self) -> None:
        """Kill the group's processes now, for a daemon that is about to exit without waiting."""
        if self._leader is not None:
            self._leader.kill()

    # --- What the ranks report

    def _read_reports(self) -> None:
        for envelope in self._router.receive():
            try:
                self._take_report(envelope)
            except (BadMessage, NotPermitted) as error:
                if self.group is not None and self.group.has_route(envelope.routing_id):
                    self.end(Internal(f"a rank is out of step: {error.detail}"))
                else:
                    logger.warning("ignored a message on the workers' socket peer=%s: %s", envelope.peer, error.detail)

    def _take_report(self, envelope: Envelope) -> None:
        check_uid(envelope.peer, os.getuid())
        if envelope.payload is None:
            raise BadMessage("a message has more than one frame")
        report: Report = report_decoder.decode(envelope.payload)
        group = self.group
        if group is None or report.group_token != group.token:
            logger.debug("ignored a report of an earlier group rank=%d", report.rank)
            return
        if isinstance(report, RankReady):
            group.admit(envelope.routing_id, report)
            if group.is_complete:
                self._mark_ready(group)
            return
        if not isinstance(report, (Answer, FilesDigested)) or not group.is_from_rank(envelope.routing_id, report.rank):
            raise BadMessage(f"{type(report).__name__} of rank {report.rank} did not come from that rank")
        if isinstance(report, FilesDigested):
            self.listener.files_digested(report)
        elif isinstance(report, StepReached):
            group.check_in_flight(report)
            self._progress.step_reached(report)
            self.listener.step_reached(report)
        elif isinstance(report, RankFailed) and report.is_fatal:
            self.end(error_for(report.code, f"rank {report.rank}: {report.detail}"))
        else:
            self._take_answer(group, report)

    def _take_answer(self, group: Group, answer: Answer) -> None:
        in_flight = group.in_flight
        answers = group.take(answer)
        if answers is not None and in_flight is not None:
            self._progress.answered(is_done=first_failure(answers) is None)
            self.state = move(GROUP_NEXT, self.state, GroupState.READY)
            self.listener.answered(in_flight.command, answers)

    # --- Moves

    def _mark_ready(self, group: Group) -> None:
        self._cancel_start_deadline()
        self.state = move(GROUP_NEXT, self.state, GroupState.READY)
        self.detail = ""
        self._ready_s = self._loop.clock.now_s()
        first = group.ranks[min(group.ranks)]
        size = group.world_size
        logger.info(
            "%d workers ready, 0 loaded, %d deferred device=%s parallel=%s attention=%s precision=%s start_s=%.2f",
            size,
            size,
            first.device_kind,
            ",".join(f"{name}:{degree}" for name, degree in first.parallel.items() if degree > 1) or "none",
            first.attention_backend,
            first.precision,
            self._ready_s - self._started_s,
        )
        self.listener.group_ready()

    def _mark_dead(self, error: XditdError) -> None:
        self._cancel_start_deadline()
        self._progress.group_ended()
        self.state = move(GROUP_NEXT, self.state, GroupState.DEAD)
        self.detail = error.detail
        if self.group is not None:
            self.outside_connections_before += self.group.outside_connections
        self.group = None
        if self._on_stopped is None:
            logger.error("worker group ended code=%s: %s", error.code, error.detail)
        self.listener.group_ended(error)

    def _leader_gone(self, status: int, output: WorkerOutput) -> None:
        self._leader = None
        why = output.explain(status)
        if not self._is_ended_by_us and self.state is not GroupState.DEAD:
            self._mark_dead(WorkersLost(why))
        elif self._on_stopped is None and output.has_cause and status == 1:
            # We ended the group, for what its ranks reported; which of them was lost first, only the leader knows.
            self.detail = f"{self.detail}; {output.verdict}"
            logger.error("worker group had ended: %s", output.verdict)
        if self._on_stopped is not None:
            self._on_stopped()
        elif output.is_final(status) and not self._is_ended_by_us:
            self._give_up(why)
        else:
            self._plan_next_life()

    def _could_not_start(self, program: str, error: OSError) -> None:
        self._mark_dead(WorkersLost(f"worker command {program}: {error.strerror}"))
        if is_want_of_descriptors(error):
            self._give_up(describe_limit())
        elif error.errno in _PASSING:
            self._plan_next_life()
        else:
            self._give_up(f"worker command {program}: {error.strerror}; correct [workers] command")

    def _plan_next_life(self) -> None:
        ready_for_s = 0.0 if self._ready_s is None else self._loop.clock.now_s() - self._ready_s
        delay_s = self.restarts.note_end(ready_for_s)
        if delay_s is None:
            self._give_up(f"the workers failed {self.restarts.failures} times in a row; last: {self.detail}")
            return
        logger.info("worker group restarts delay_s=%.2f failures=%d", delay_s, self.restarts.failures)
        self._restart_timer = self._loop.call_later(delay_s, self.start)

    def _give_up(self, why: str) -> None:
        self.state = move(GROUP_NEXT, self.state, GroupState.GIVEN_UP)
        self.detail = why
        error = WorkersUnavailable(f"{why}; see xditd logs, cure the cause, then restart the daemon")
        logger.error("worker group given up: %s", error.detail)
        self.listener.group_given_up(error)

    # --- Deadlines

    def _start_overdue(self) -> None:
        ready = len(self.group.ranks) if self.group is not None else 0
        waited_s = self._configuration.start_deadline_s
        said = self._leader.last_words if self._leader is not None else ""
        self.end(
            WorkersLost(
                f"only {ready} ranks reported within {waited_s:g} s of the start; their last line: {said or 'none'}; "
                "if they were only slow, raise start_deadline_s"
            )
        )

    def _fell_silent(self, silent_s: float) -> None:
        self.end(WorkersLost(f"no report for {silent_s:.1f} s while {self._live_group().what_is_missing}"))

    def _cancel_start_deadline(self) -> None:
        if self._start_deadline is not None:
            self._start_deadline.stop()
            self._start_deadline = None

    def _live_group(self) -> Group:
        if self.group is None:
            raise Internal(f"the worker group is {self.state.value}: nothing can be asked of it")
        return self.group
