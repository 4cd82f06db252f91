"""``Stop``: shut the daemon down."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import Stopping
from xditd.ipc.requests import Stop


def stop(service: Service, session: Session, request: Stop) -> None:
    """Answer, then stop: queued jobs fail."""
    service.replies.reply(session, Stopping(request_id=request.request_id))
    service.stop(f"client process {session.process.pid} asked for it")
