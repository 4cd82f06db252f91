"""``Beat``: a sign of life."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import BeatHeard
from xditd.ipc.requests import Beat


def hear(_: Service, __: Session, request: Beat) -> BeatHeard:
    """Answer; that something came was noted already."""
    return BeatHeard(request_id=request.request_id)
