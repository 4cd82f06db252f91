"""``Goodbye``: close the session."""

from __future__ import annotations

from xditd.daemon.front.service import SAID_GOODBYE, Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import Farewell
from xditd.ipc.requests import Goodbye


def close(service: Service, session: Session, request: Goodbye) -> None:
    """End the session and its leases; the reply follows once no worker maps the client's memory."""
    farewell = Farewell(request_id=request.request_id)
    service.end_session(session, SAID_GOODBYE, lambda: service.replies.send_last(session.routing_id, farewell))
