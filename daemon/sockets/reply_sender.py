"""Replies to clients: they leave without waiting, or not at all."""

from __future__ import annotations

import logging
import time
from typing import Final

from xditd.daemon.sockets.routers import Delivery, Router
from xditd.daemon.sockets.sessions import Session, Sessions
from xditd.ipc import limits
from xditd.ipc.codec import encode
from xditd.ipc.errors import XditdError
from xditd.ipc.name_lists import for_message
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Failed

logger = logging.getLogger(__name__)

MOST_UNSENT: Final = 64
MOST_UNSENT_BYTES: Final = 256 * 1024
MOST_UNSENT_S: Final = 0.002
"""Replies that wait for the end of a round, at most. A round may serve 256 requests, and the worst that somebody can
send takes several milliseconds to be refused: nobody else's answer should wait for many of them."""


class ReplySender:
    """Send replies. A client that does not read, or is disconnected, lands in :attr:`unreachable` to be closed later.

    Later, because a reply may be sent while a list of jobs or leases is being walked, which closing a session changes.

    Replies of one round of the loop leave together, in their order, by :meth:`flush`. Sent one by one, each of them
    wakes ZeroMQ's thread, which has fallen asleep since the one before, and that took as long as the rest of a request.
    """

    def __init__(self, router: Router, sessions: Sessions) -> None:
        self.sessions = sessions
        self.unreachable: dict[bytes, str] = {}
        self._router = router
        self._unsent: list[tuple[bytes, bytes, bool]] = []
        self._unsent_bytes = 0
        self._unsent_since_s = 0.0

    def reply(self, session: Session, reply: Reply) -> None:
        """Send to a session. One that said goodbye still gets the ends of its requests, if it is there to read them."""
        if self.sessions.find(session.routing_id) is not session:
            self.send_last(session.routing_id, reply)
        elif session.routing_id not in self.unreachable:
            self._put(session.routing_id, encode(reply), has_session=True)

    def answer(self, routing_id: bytes, reply: Reply) -> None:
        """Send to a connection that may have no session."""
        if routing_id not in self.unreachable:
            self._put(routing_id, encode(reply), has_session=self.sessions.find(routing_id) is not None)

    def send_last(self, routing_id: bytes, reply: Reply) -> None:
        """Send to a connection without a session, whether it arrives or not."""
        self._put(routing_id, encode(reply), has_session=False)

    def flush(self) -> None:
        """Send what waits for the end of the round."""
        unsent, self._unsent, self._unsent_bytes = self._unsent, [], 0
        for routing_id, payload, has_session in unsent:
            if routing_id in self.unreachable:
                continue
            delivery = self._router.send(routing_id, payload)
            if has_session and delivery is not Delivery.SENT:
                self.unreachable[routing_id] = (
                    "it does not read its replies" if delivery is Delivery.NO_ROOM else "its connection is closed"
                )

    def close(self, linger_ms: int) -> None:
        self.flush()
        self._router.close(linger_ms)

    def _put(self, routing_id: bytes, payload: bytes, *, has_session: bool) -> None:
        now = time.monotonic()
        if not self._unsent:
            self._unsent_since_s = now
        self._unsent.append((routing_id, payload, has_session))
        self._unsent_bytes += len(payload)
        if (
            len(self._unsent) >= MOST_UNSENT
            or self._unsent_bytes >= MOST_UNSENT_BYTES
            or now - self._unsent_since_s >= MOST_UNSENT_S
        ):
            self.flush()


def failed(request_id: str, error: XditdError) -> Failed:
    """Say an error in a message."""
    return Failed(
        request_id=request_id,
        code=error.code,
        detail=error.detail[: limits.MAX_TEXT_CHARS],
        retry_after_s=error.retry_after_s,
        names=for_message(error.names),
    )
