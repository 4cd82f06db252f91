"""The worker group: starts its processes, sends commands to its ranks, ends it on faults and restarts it."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Mapping
from functools import partial
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.groups.deadlines import CommandDeadline, LearnedDurations
from xditd.daemon.groups.leader import Leader, leader_command
from xditd.daemon.groups.lifecycle import GROUP_NEXT, GroupListener, RestartPolicy
from xditd.daemon.groups.ranks import CommandMaker, Ranks, ReportReader, first_failure
from xditd.daemon.groups.standby import Standby
from xditd.daemon.groups.worker_output import WorkerOutput
from xditd.daemon.operations.event_loop import Callback, Deadline, EventLoop, Timer
from xditd.daemon.operations.log_buffer import LogBuffer
from xditd.daemon.operations.states import move
from xditd.daemon.sockets.routers import Router
from xditd.ipc.errors import BadMessage, Internal, WorkersLost, WorkersUnavailable, XditdError, error_for
from xditd.ipc.host_limits import count_memory_kills, explain_kill
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors
from xditd.ipc.status import GroupState
from xditd.ipc.worker_messages import (
    Answer,
    CancelRun,
    FilesDigested,
    FramesReached,
    MemoryCounted,
    RankFailed,
    RankReady,
    Report,
    Run,
    Shutdown,
    StepReached,
)

logger = logging.getLogger(__name__)

SHUTDOWN_GRACE_S: Final = 5.0
"""From the ``Shutdown`` command to SIGTERM: unmapping takes well under a second."""

_TRANSIENT_ERRORS: Final = (errno.EAGAIN, errno.ENOMEM)
"""Errors of fork and exec after which another try may succeed."""


class WorkerGroup:
    """Own the processes of a worker group, and send commands to its ranks, one at a time.

    READY means that every rank has reported, not that its process exists. All processes of the group end together:
    after a rank's death, an unexpected report or a missed deadline. ``name`` is for log lines. ``listener`` is set
    once, before :meth:`start`. Groups share only ``reader`` and ``router``, the workers' socket.
    """

    listener: GroupListener

    def __init__(
        self,
        name: str,
        loop: EventLoop,
        router: Router,
        reader: ReportReader,
        configuration: Configuration,
        environment: Mapping[str, str],
        log_buffer: LogBuffer,
    ) -> None:
        self.name = name
        self.state = GroupState.DEAD
        self.detail = "not started yet"
        self.ranks: Ranks | None = None
        self.starts = 0
        self.restarts = RestartPolicy(configuration.max_restarts)
        self._loop = loop
        self._router = router
        self._reader = reader
        self._configuration = configuration
        self._environment = environment
        self._log_buffer = log_buffer
        self._leader: Leader | None = None
        self._standby = Standby(loop, log_buffer, configuration, environment)
        self._is_ended_by_us = False
        self._is_standby_silent = False
        self._outside_connections_before = 0
        self._kills_before = 0
        self._started_s = 0.0
        self._ready_s: float | None = None
        self._start_deadline = Deadline(loop, self._start_overdue)
        self._restart_timer: Timer | None = None
        self._on_stopped: Callback | None = None
        self._deadline = CommandDeadline(loop, LearnedDurations.of(configuration, loop.clock), self._deadline_missed)

    @property
    def is_idle(self) -> bool:
        return self.state is GroupState.READY

    @property
    def is_alive(self) -> bool:
        """Whether the ranks take commands, so that what they have mapped has to be unmapped."""
        return self.state in (GroupState.READY, GroupState.BUSY)

    @property
    def is_ending(self) -> bool:
        """Whether the group has ended, but processes of it are left, which may have memory mapped."""
        return self.state is GroupState.DEAD and self._leader is not None

    @property
    def expected_world_size(self) -> int:
        """How many ranks there are, or will be; 0 while that is not known."""
        if self.ranks is not None and self.ranks.world_size:
            return self.ranks.world_size
        return self._configuration.workers if isinstance(self._configuration.workers, int) else 0

    @property
    def overdue_s(self) -> float:
        """How long the running command has exceeded its deadline."""
        return self._deadline.overdue_s

    @property
    def outside_connections(self) -> int:
        """Connections to other hosts that its ranks have attempted, over all restarts."""
        return self._outside_connections_before + (self.ranks.outside_connections if self.ranks is not None else 0)

    def start(self) -> None:
        """Start the leader, and with it the ranks."""
        self.state = move(GROUP_NEXT, self.state, GroupState.STARTING)
        self.detail = "workers are starting" if self.starts == 0 else f"workers are being rebuilt: {self.detail}"
        self.starts += 1
        self._started_s = self._loop.clock.now_s()
        self._ready_s = None
        self._is_ended_by_us = self._is_standby_silent = False
        token = os.urandom(16).hex()
        self.ranks = Ranks(self._router, token)
        self._reader.receivers[token] = self
        arguments = leader_command(self._configuration, token)[len(self._configuration.worker_command) :]
        taken = self._standby.take(arguments, self._leader_gone, self._standby_silent)
        if taken is None:
            self._start_leader(token)
        else:
            self._leader_started(taken)

    def _start_leader(self, token: str) -> None:
        command = leader_command(self._configuration, token)
        try:
            leader = Leader(self._loop, self._log_buffer, command, self._environment, self._leader_gone)
        except OSError as error:
            self._start_failed(command[0], error)
        else:
            self._leader_started(leader)

    def _leader_started(self, leader: Leader) -> None:
        self._leader = leader
        self._kills_before = count_memory_kills()
        self._start_deadline.extend(self._configuration.start_deadline_s)
        logger.info("%s starting leader_pid=%d start=%d", self.name, leader.pid, self.starts)

    def send(self, make: CommandMaker) -> None:
        """Send the next command to every rank; the listener receives the answers, or the end of the group."""
        ranks = self._live_ranks()
        self.state = move(GROUP_NEXT, self.state, GroupState.BUSY)
        command, is_sent = ranks.send(make)
        self._deadline.begin(command)
        if not is_sent:
            self.end(WorkersLost("a rank does not read its commands, or has closed its connection"))

    def cancel_run(self) -> None:
        """Tell the ranks to stop the running job, if there is one."""
        ranks = self.ranks
        if ranks is not None and ranks.in_flight is not None and isinstance(ranks.in_flight.command, Run):
            target = ranks.in_flight.command.op_number
            ranks.send_unanswered(lambda number: CancelRun(op_number=number, target_op_number=target))
            self._deadline.cancelled()

    def end(self, error: XditdError) -> None:
        """End the group's processes because of ``error``; it restarts as the restart policy allows."""
        if self.state in (GroupState.DEAD, GroupState.GIVEN_UP):
            return
        self._is_ended_by_us = True
        self._mark_dead(error)
        if self._leader is not None:
            self._leader.terminate()

    def shut_down(self, on_stopped: Callback) -> None:
        """End the group without a restart; ``on_stopped`` is called once its processes have ended."""
        self._on_stopped = partial(self._standby.end, on_stopped)
        if self._restart_timer is not None:
            self._restart_timer.cancel()
        leader = self._leader
        if leader is None:
            self._on_stopped()
        elif self._unmaps_at_shutdown():
            self._mark_dead(WorkersLost("the daemon is stopping"))
            self._loop.deadline(SHUTDOWN_GRACE_S, leader.terminate)
        else:
            self.end(WorkersLost("the daemon is stopping"))

    def _unmaps_at_shutdown(self) -> bool:
        """Tell idle ranks to unmap what they have mapped, and to exit; return whether they will.

        Ranks without a command so far have mapped nothing, and may still import: they need not be waited for.
        """
        if not self.is_idle or self._live_ranks().is_unused:
            return False
        return self._live_ranks().send_unanswered(lambda number: Shutdown(op_number=number))

    def kill(self) -> None:
        """Kill the group's processes now; for a daemon that exits without waiting."""
        self._standby.kill()
        if self._leader is not None:
            self._leader.kill()

    # --- What the ranks report

    def has_route(self, routing_id: bytes) -> bool:
        return self.ranks is not None and self.ranks.has_route(routing_id)

    def take_report(self, routing_id: bytes, report: Report) -> None:
        """Handle a report of a rank.

        Raises:
            BadMessage: no such report is expected, or it did not come from the rank that it names.
        """
        ranks = self._live_ranks()
        if isinstance(report, RankReady):
            ranks.admit(routing_id, report)
            if ranks.is_complete:
                self._mark_ready(ranks)
            return
        if not isinstance(report, (Answer, FilesDigested, MemoryCounted)) or not ranks.is_from_rank(
            routing_id, report.rank
        ):
            raise BadMessage(f"{type(report).__name__} of rank {report.rank} did not come from that rank")
        if isinstance(report, FilesDigested):
            self.listener.files_digested(report)
        elif isinstance(report, MemoryCounted):
            ranks.memory[report.rank] = report.memory
        elif isinstance(report, StepReached):
            ranks.check_in_flight(report)
            self._deadline.step_reached(report)
            self.listener.step_reached(report)
        elif isinstance(report, FramesReached):
            ranks.check_in_flight(report)
            self._deadline.frames_reached(report)
            self.listener.frames_reached(report)
        elif isinstance(report, RankFailed) and report.is_fatal:
            self.end(error_for(report.code, f"rank {report.rank}: {report.detail}"))
        else:
            self._take_answer(ranks, report)

    def _take_answer(self, ranks: Ranks, answer: Answer) -> None:
        in_flight = ranks.check_in_flight(answer)
        answers = ranks.take(answer)
        if answers is not None:
            is_done = first_failure(answers) is None
            self._deadline.answered(is_done=is_done)
            self.state = move(GROUP_NEXT, self.state, GroupState.READY)
            if is_done and isinstance(in_flight.command, Run):
                self.restarts.note_served()
            self.listener.answered(in_flight.command, answers)

    # --- State transitions

    def _mark_ready(self, ranks: Ranks) -> None:
        self._start_deadline.stop()
        self.state = move(GROUP_NEXT, self.state, GroupState.READY)
        self.detail = ""
        self._ready_s = self._loop.clock.now_s()
        logger.info("%s start_s=%.2f", ranks.summary, self._ready_s - self._started_s)
        self._standby.start_later(ranks.device_kind)
        self.listener.group_ready()

    def _mark_dead(self, error: XditdError) -> None:
        self._start_deadline.stop()
        self._deadline.group_ended()
        self.state = move(GROUP_NEXT, self.state, GroupState.DEAD)
        self.detail = error.detail
        self._outside_connections_before = self.outside_connections
        if self.ranks is not None:
            del self._reader.receivers[self.ranks.token]
            self.ranks = None
        if self._on_stopped is None:
            logger.error("%s ended code=%s: %s", self.name, error.code, error.detail)
        self.listener.group_ended(error)

    def _leader_gone(self, status: int, output: WorkerOutput) -> None:
        self._leader = None
        if self._is_standby_silent and self.ranks is not None:
            self._is_standby_silent = False
            self._start_leader(self.ranks.token)
            return
        why = output.explain(status)
        if status == -signal.SIGKILL and not self._is_ended_by_us:
            why = "; ".join(filter(None, (why, explain_kill(self._kills_before))))
        if not self._is_ended_by_us and self.state is not GroupState.DEAD:
            self._mark_dead(WorkersLost(why))
        elif self._on_stopped is None and output.has_cause and status == 1:
            # The daemon ended the group because of a rank's report; only the leader knows which rank was lost first.
            self.detail = f"{self.detail}; {output.cause}"
            logger.error("%s had ended: %s", self.name, output.cause)
        self.listener.processes_ended()
        if self._on_stopped is not None:
            self._on_stopped()
        elif output.is_final(status) and not self._is_ended_by_us:
            self._give_up(why)
        else:
            self._restart_later()

    def _standby_silent(self) -> None:
        """Start the group without its standby, which has not read the token, so that this is no failed start."""
        if self._leader is not None and self.ranks is not None:
            logger.warning(
                "standby leader pid=%d does not answer (stopped, or stuck?): it is killed, and the group imports again",
                self._leader.pid,
            )
            self._is_standby_silent = True
            self._leader.kill()

    def _start_failed(self, program: str, error: OSError) -> None:
        self._mark_dead(WorkersLost(f"worker command {program}: {error.strerror}"))
        if is_want_of_descriptors(error):
            self._give_up(describe_limit())
        elif error.errno in _TRANSIENT_ERRORS:
            self._restart_later()
        else:
            self._give_up(f"worker command {program}: {error.strerror}; correct [workers] command")

    def _restart_later(self) -> None:
        ready_for_s = 0.0 if self._ready_s is None else self._loop.clock.now_s() - self._ready_s
        delay_s = self.restarts.note_end(ready_for_s)
        if delay_s is None:
            self._give_up(f"the workers failed {self.restarts.failures} times in a row; last: {self.detail}")
            return
        logger.info("%s restarts delay_s=%.2f failures=%d", self.name, delay_s, self.restarts.failures)
        self._restart_timer = self._loop.call_later(delay_s, self.start)

    def _give_up(self, why: str) -> None:
        self._standby.end(lambda: None)
        self.state = move(GROUP_NEXT, self.state, GroupState.GIVEN_UP)
        self.detail = why
        error = WorkersUnavailable(f"{why}; see xditd logs, cure the cause, then restart the daemon")
        logger.error("%s given up: %s", self.name, error.detail)
        self.listener.group_given_up(error)

    # --- Deadlines

    def _start_overdue(self) -> None:
        ready = len(self.ranks.ready) if self.ranks is not None else 0
        waited_s = self._configuration.start_deadline_s
        last = self._leader.last_output if self._leader is not None else ""
        self.end(
            WorkersLost(
                f"only {ready} ranks reported within {waited_s:g} s of the start; their last line: {last or 'none'}; "
                "if they were only slow, raise start_deadline_s"
            )
        )

    def _deadline_missed(self, silent_s: float) -> None:
        self.end(WorkersLost(f"no report for {silent_s:.1f} s while {self._live_ranks().what_is_missing}"))

    def _live_ranks(self) -> Ranks:
        if self.ranks is None:
            raise Internal(f"the worker group is {self.state.value}: it takes no commands")
        return self.ranks
