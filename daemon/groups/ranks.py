"""The ranks of a worker group: which are ready, the command in flight, and the reader of their reports."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.sockets.credentials import check_uid
from xditd.daemon.sockets.routers import Delivery, Envelope, Router
from xditd.ipc import limits
from xditd.ipc.codec import encode, report_decoder
from xditd.ipc.errors import BadMessage, Internal, NotPermitted, OtherRankFailed, XditdError
from xditd.ipc.status import ForwardPath, FusedCheck, LoraCounts, MemoryParts, PackedProducts, SplitCheck
from xditd.ipc.worker_messages import (
    Answer,
    AnyCommand,
    ComponentCopied,
    Done,
    Plugged,
    RankFailed,
    RankReady,
    RankTally,
    Report,
)

logger = logging.getLogger(__name__)

CommandMaker = Callable[[int], AnyCommand]
"""Builds a command from its ``op_number``."""

Answers = Sequence[Answer]


def first_failure(answers: Answers) -> RankFailed | None:
    """Return the lowest rank's failure, or ``None``; ``OtherRankFailed`` only if no rank gave another cause."""
    failures = [answer for answer in answers if isinstance(answer, RankFailed)]
    return min(failures, key=lambda failure: (failure.code == OtherRankFailed.code, failure.rank), default=None)


@dataclass
class InFlight:
    """The command that all ranks run now."""

    command: AnyCommand
    answers: dict[int, Answer] = field(default_factory=dict)


class Ranks:
    """The ranks of the group that ``token`` names. Complete once all ``world_size`` ranks have reported."""

    def __init__(self, router: Router, token: str) -> None:
        self.token = token
        self.ready: dict[int, RankReady] = {}
        self.tallies: dict[int, RankTally] = {}
        self.memory: dict[int, MemoryParts] = {}
        self.in_flight: InFlight | None = None
        self._router = router
        self._routes: dict[int, bytes] = {}
        self._next_op_number = 1
        self._fused_checks: dict[tuple[str, str], FusedCheck] = {}
        self.split_checks: deque[SplitCheck] = deque(maxlen=limits.MAX_SPLIT_CHECKS)
        """The last checks of calls that were split by rows or tokens, oldest first."""
        self.forward_paths: deque[ForwardPath] = deque(maxlen=limits.MAX_FORWARD_PATHS)
        """The paths that were chosen last, oldest first."""

    @property
    def world_size(self) -> int:
        """0 until the first rank has reported."""
        return next((ready.world_size for ready in self.ready.values()), 0)

    @property
    def is_unused(self) -> bool:
        """Whether they have got no command yet, so that nothing is mapped."""
        return self._next_op_number == 1

    @property
    def outside_connections(self) -> int:
        """Connections to other hosts that its ranks have attempted."""
        return sum(tally.outside_connections for tally in self.tallies.values())

    @property
    def fused_checks(self) -> tuple[FusedCheck, ...]:
        """The fast path checks (fused kernels against unmodified modules), oldest first; refusals are kept longest."""
        return tuple(self._fused_checks.values())

    @property
    def packed_products(self) -> tuple[PackedProducts, ...]:
        """The products of packed weights that rank 0 has counted."""
        return self.tallies[0].packed_products if 0 in self.tallies else ()

    @property
    def loras(self) -> LoraCounts:
        """The jobs with LoRAs that rank 0 has counted."""
        return self.tallies[0].loras if 0 in self.tallies else LoraCounts()

    @property
    def is_complete(self) -> bool:
        return bool(self.ready) and len(self.ready) == self.world_size

    @property
    def first(self) -> RankReady | None:
        """The report of the lowest rank; ``None`` before any rank has reported."""
        return self.ready[min(self.ready)] if self.ready else None

    @property
    def device_kind(self) -> str:
        """The kind of device of a complete group: ``cuda`` or ``cpu``."""
        return self.ready[min(self.ready)].device_kind

    @property
    def summary(self) -> str:
        """Describe a complete group for the log."""
        size, first = self.world_size, self.ready[min(self.ready)]
        degrees = ",".join(f"{name}:{degree}" for name, degree in first.parallel.items() if degree > 1) or "none"
        return (
            f"{size} workers ready, 0 loaded, {size} deferred device={first.device_kind} parallel={degrees} "
            f"attention={first.attention_backend} precision={first.precision}"
        )

    @property
    def what_is_missing(self) -> str:
        """Name the ranks that have not answered, and the command."""
        if self.in_flight is None:
            return "no command ran"
        missing = sorted(self.ready.keys() - self.in_flight.answers.keys())
        return f"{type(self.in_flight.command).__name__} ran; ranks {missing} have not answered"

    def admit(self, routing_id: bytes, ready: RankReady) -> None:
        """Add a rank that is ready.

        Raises:
            BadMessage: its number is taken, or its world size differs from the others'.
        """
        if ready.rank in self.ready:
            raise BadMessage(f"rank {ready.rank} reported ready twice")
        if ready.rank >= ready.world_size or (self.ready and ready.world_size != self.world_size):
            raise BadMessage(f"rank {ready.rank} of {ready.world_size} does not fit a group of {self.world_size}")
        self.ready[ready.rank] = ready
        self._routes[ready.rank] = routing_id

    def is_from_rank(self, routing_id: bytes, rank: int) -> bool:
        return self._routes.get(rank) == routing_id

    def has_route(self, routing_id: bytes) -> bool:
        return routing_id in self._routes.values()

    def send(self, make: CommandMaker) -> tuple[AnyCommand, bool]:
        """Send the next command to every rank. Returns it, and whether it was sent to all."""
        command = make(self._next_op_number)
        self._next_op_number += 1
        self.in_flight = InFlight(command)
        return command, self._send_all(command)

    def send_unanswered(self, make: CommandMaker) -> bool:
        """Send a command that the ranks do not answer, also while another one is in flight."""
        command = make(self._next_op_number)
        self._next_op_number += 1
        return self._send_all(command)

    def check_in_flight(self, answer: Answer) -> InFlight:
        """Find the command that an answer belongs to.

        Raises:
            BadMessage: that command is not in flight.
        """
        if self.in_flight is None or answer.op_number != self.in_flight.command.op_number:
            raise BadMessage(f"rank {answer.rank} answered command {answer.op_number}, which is not in flight")
        return self.in_flight

    def take(self, answer: Answer) -> Sequence[Answer] | None:
        """Note an answer. Returns all of them, in rank order, once every rank has answered.

        Raises:
            BadMessage: the command is not in flight, or the rank has answered it.
        """
        in_flight = self.check_in_flight(answer)
        if answer.rank in in_flight.answers:
            raise BadMessage(f"rank {answer.rank} answered command {answer.op_number} twice")
        in_flight.answers[answer.rank] = answer
        if isinstance(answer, (Done, ComponentCopied, Plugged)):
            self.tallies[answer.rank] = answer.tally
            for check in answer.tally.fused_checks:
                self._note_check(answer.rank, check)
            self.split_checks.extend(answer.tally.split_checks)
            self.forward_paths.extend(answer.tally.forward_paths)
        if len(in_flight.answers) < self.world_size:
            return None
        answers = [in_flight.answers[rank] for rank in sorted(in_flight.answers)]
        self.in_flight = None
        return answers

    def _note_check(self, rank: int, check: FusedCheck) -> None:
        """CopyComponent the checks of rank 0, which compares the most images, and refusals of any rank."""
        key = (check.kernels, check.case)
        if rank != 0 and check.is_used:
            return
        self._fused_checks.pop(key, None)
        self._fused_checks[key] = check
        if len(self._fused_checks) > limits.MAX_FUSED_CHECKS:
            oldest = min(self._fused_checks, key=lambda each: not self._fused_checks[each].is_used)
            del self._fused_checks[oldest]

    def _send_all(self, command: AnyCommand) -> bool:
        payload = encode(command)
        return all([self._router.send(route, payload) is Delivery.SENT for route in self._routes.values()])


class Receiver(Protocol):
    """A group that receives reports. ``take_report`` raises ``BadMessage`` for an unexpected one."""

    def take_report(self, routing_id: bytes, report: Report) -> None: ...

    def has_route(self, routing_id: bytes) -> bool: ...

    def end(self, error: XditdError) -> None: ...


class ReportReader:
    """Read the workers' socket and pass each report to its group; :attr:`receivers` are the groups by token."""

    def __init__(self, loop: EventLoop, router: Router) -> None:
        self.receivers: dict[str, Receiver] = {}
        self._router = router
        loop.watch_socket(router.socket, self._read)

    def _read(self) -> None:
        for envelope in self._router.receive():
            try:
                self._deliver(envelope)
            except (BadMessage, NotPermitted) as error:
                for receiver in list(self.receivers.values()):
                    if receiver.has_route(envelope.routing_id):
                        receiver.end(Internal(f"unexpected report of a rank: {error.detail}"))
                        break
                else:
                    logger.warning("ignored a message on the workers' socket peer=%s: %s", envelope.peer, error.detail)

    def _deliver(self, envelope: Envelope) -> None:
        check_uid(envelope.peer, os.getuid())
        if envelope.payload is None:
            raise BadMessage("a message has more than one frame")
        report: Report = report_decoder.decode(envelope.payload)
        receiver = self.receivers.get(report.group_token)
        if receiver is None:
            logger.debug("ignored a report of an earlier group rank=%d", report.rank)
        else:
            receiver.take_report(envelope.routing_id, report)
