"""The daemon's side of the clients' socket: replies go out without waiting, or not at all."""

from __future__ import annotations

import logging

from xditd.daemon.routers import Delivery, Router
from xditd.daemon.sessions import Session, Sessions
from xditd.ipc import limits
from xditd.ipc.codec import encode
from xditd.ipc.errors import XditdError
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Failed

logger = logging.getLogger(__name__)


class Front:
    """Send replies. A client that does not read, or is disconnected, lands in :attr:`unreachable` to be closed later.

    Later, because a reply may be sent while a list of jobs or loans is being walked, which closing a session changes.
    """

    def __init__(self, router: Router, sessions: Sessions) -> None:
        self.sessions = sessions
        self.unreachable: dict[bytes, str] = {}
        self._router = router

    def reply(self, session: Session, reply: Reply) -> None:
        """Send to a session. One that said goodbye still gets the ends of its requests, if it is there to read them."""
        if self.sessions.find(session.routing_id) is not session:
            self.part(session.routing_id, reply)
        elif session.routing_id not in self.unreachable:
            delivery = self._router.send(session.routing_id, encode(reply))
            if delivery is not Delivery.SENT:
                self.unreachable[session.routing_id] = (
                    "it does not read its replies" if delivery is Delivery.NO_ROOM else "its connection is closed"
                )

    def answer(self, routing_id: bytes, reply: Reply) -> None:
        """Send to a connection that may have no session."""
        session = self.sessions.find(routing_id)
        if session is not None:
            self.reply(session, reply)
        else:
            self.part(routing_id, reply)

    def part(self, routing_id: bytes, reply: Reply) -> None:
        """Send a last word to a connection without a session, whether it arrives or not."""
        self._router.send(routing_id, encode(reply))

    def close(self, linger_ms: int) -> None:
        self._router.close(linger_ms)


def failed(request_id: str, error: XditdError) -> Failed:
    """Say an error in a message."""
    return Failed(
        request_id=request_id,
        code=error.code,
        detail=error.detail[: limits.MAX_TEXT_CHARS],
        retry_after_s=error.retry_after_s,
    )
