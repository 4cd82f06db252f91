"""The workers' socket, which all groups share: each report goes to the group whose token it carries."""

from __future__ import annotations

import logging
import os
from typing import Protocol

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.sockets.credentials import check_uid
from xditd.daemon.sockets.routers import Envelope, Router
from xditd.ipc.codec import report_decoder
from xditd.ipc.errors import BadMessage, Internal, NotPermitted, XditdError
from xditd.ipc.worker_messages import Report

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """A group as the reader sees it. ``take_report`` raises ``BadMessage`` where a report does not fit."""

    def take_report(self, routing_id: bytes, report: Report) -> None: ...

    def has_route(self, routing_id: bytes) -> bool: ...

    def end(self, error: XditdError) -> None: ...


class ReportReader:
    """Read ``router``. :attr:`receivers` are the groups that live now, by their tokens."""

    def __init__(self, loop: EventLoop, router: Router) -> None:
        self.receivers: dict[str, Receiver] = {}
        self._router = router
        loop.watch_socket(router.socket, self._read)

    def _read(self) -> None:
        for envelope in self._router.receive():
            try:
                self._pass_on(envelope)
            except (BadMessage, NotPermitted) as error:
                for receiver in list(self.receivers.values()):
                    if receiver.has_route(envelope.routing_id):
                        receiver.end(Internal(f"a rank is out of step: {error.detail}"))
                        break
                else:
                    logger.warning("ignored a message on the workers' socket peer=%s: %s", envelope.peer, error.detail)

    def _pass_on(self, envelope: Envelope) -> None:
        check_uid(envelope.peer, os.getuid())
        if envelope.payload is None:
            raise BadMessage("a message has more than one frame")
        report: Report = report_decoder.decode(envelope.payload)
        receiver = self.receivers.get(report.group_token)
        if receiver is None:
            logger.debug("ignored a report of an earlier group rank=%d", report.rank)
        else:
            receiver.take_report(envelope.routing_id, report)
