"""``Beat``: a heartbeat."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import BeatHeard
from xditd.ipc.requests import Beat


def answer(_: Service, __: Session, request: Beat) -> BeatHeard:
    """Only answer: the dispatcher has noted the time already, as for every request."""
    return BeatHeard(request_id=request.request_id)
