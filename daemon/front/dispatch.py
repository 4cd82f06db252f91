"""Dispatch each message on the clients' socket to the handler of its request."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from xditd.daemon.front.handlers import (
    adopt,
    announce,
    beat,
    cancel,
    check_memory,
    goodbye,
    hello,
    jobs,
    lend,
    logs,
    return_loan,
    revoke,
    status,
    stop,
)
from xditd.daemon.front.service import Service
from xditd.daemon.queue.jobs import op_of
from xditd.daemon.sockets.credentials import Credentials, check_uid
from xditd.daemon.sockets.routers import Envelope, failed
from xditd.daemon.sockets.sessions import Session
from xditd.ipc import requests
from xditd.ipc.codec import request_decoder
from xditd.ipc.errors import BadMessage, NotPermitted, SessionLost, XditdError
from xditd.ipc.protocol import Reply, Request
from xditd.ipc.replies import Status
from xditd.ipc.status import DaemonStatus

logger = logging.getLogger(__name__)

Handler = Callable[[Service, Session, Any], Reply | None]

HANDLERS: Final[Mapping[type[Request], Handler]] = {
    requests.Beat: beat.answer,
    requests.Goodbye: goodbye.close,
    requests.CheckMemory: check_memory.check,
    requests.Announce: announce.announce,
    requests.Lend: lend.lend,
    requests.ReturnLoan: return_loan.take_back,
    requests.Adopt: adopt.adopt,
    requests.Revoke: revoke.revoke,
    requests.Call: jobs.run,
    requests.Generate: jobs.run,
    requests.Decode: jobs.run,
    requests.Encode: jobs.run,
    requests.EncodeText: jobs.run,
    requests.EncodePrompt: jobs.run,
    requests.ReadTensors: jobs.run,
    requests.Cancel: cancel.cancel,
    requests.GetLogs: logs.read,
    requests.Stop: stop.stop,
}
"""All but ``Hello``, which opens the session that the others need, and ``GetStatus``, whose answer is shared."""

_LOGGED_AT_DEBUG: Final = frozenset(
    {requests.Hello, requests.Goodbye, requests.Beat, requests.GetStatus, requests.GetLogs}
)
"""Monitoring sends these all the time: at INFO they would replace other requests in the log that ``GetLogs`` shows."""

UNREADABLE_ID: Final = "?"
"""The request id in the answer to a message whose own id could not be read."""


class Dispatcher:
    """Read the clients' socket. Each message is answered at once, or becomes a job that answers it later."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._own_uid = os.getuid()
        self._status: DaemonStatus | None = None
        service.loop.watch_socket(service.client_router.socket, self._read)

    def _read(self) -> None:
        # The state changes only by the requests of this batch, so successive GetStatus requests share one snapshot.
        self._status = None
        for envelope in self._service.client_router.receive():
            self._serve(envelope)

    def _serve(self, envelope: Envelope) -> None:
        began_s = time.monotonic()
        request_id = UNREADABLE_ID
        try:
            peer = check_uid(envelope.peer, self._own_uid)
            if envelope.payload is None:
                raise BadMessage("a message has exactly one frame; use a DEALER socket")
            self._service.quotas.check_message(len(envelope.payload))
            request: Request = request_decoder.decode(envelope.payload)
            request_id = request.request_id
            reply = self._handle(envelope, peer, request)
        except XditdError as error:
            if isinstance(error, BadMessage):
                request_id = error.request_id or request_id
            self._refuse(envelope, request_id, error)
            return
        level = logging.DEBUG if type(request) in _LOGGED_AT_DEBUG else logging.INFO
        if reply is None:
            return
        self._service.replies.answer(envelope.routing_id, reply)
        if logger.isEnabledFor(level):
            logger.log(
                level,
                "request done op=%s request_id=%s client_pid=%d took_ms=%.2f",
                op_of(request),
                request_id,
                peer.pid,
                (time.monotonic() - began_s) * 1000,
            )

    def _handle(self, envelope: Envelope, peer: Credentials, request: Request) -> Reply | None:
        if not isinstance(request, requests.GetStatus):
            self._status = None
        if isinstance(request, requests.Hello):
            return hello.greet(self._service, envelope.routing_id, envelope.peer, peer, request)
        session = self._service.sessions.find(envelope.routing_id)
        if session is None:
            raise SessionLost(
                "no session on this connection: say hello first (if you did, the session was closed: see xditd logs)"
            )
        if session.address != envelope.peer:
            raise NotPermitted(f"process {peer.pid} uses the session of process {session.process.pid}")
        session.heard_s = self._service.loop.clock.now_s()
        if isinstance(request, requests.GetStatus):
            self._status = self._status or status.describe_daemon(self._service)
            return Status(request_id=request.request_id, daemon=self._status)
        return HANDLERS[type(request)](self._service, session, request)

    def _refuse(self, envelope: Envelope, request_id: str, error: XditdError) -> None:
        logger.info(
            "request refused request_id=%s peer=%s code=%s detail=%r",
            request_id,
            envelope.peer,
            error.code,
            error.detail[:500],
        )
        self._service.replies.answer(envelope.routing_id, failed(request_id, error))
