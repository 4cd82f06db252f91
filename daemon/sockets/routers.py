"""The two ROUTER sockets: bounded, never blocking, and aware of who sends; and the replies that clients get."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from xditd.daemon.sockets.sessions import Session, Sessions
from xditd.ipc import limits
from xditd.ipc.addresses import endpoint
from xditd.ipc.codec import encode
from xditd.ipc.errors import XditdError
from xditd.ipc.name_lists import for_message
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Failed

BATCH: Final = 256
"""Messages read from one socket before the others get their turn."""

_SEND_LIMIT: Final = 256
_RECEIVE_LIMIT: Final = 32
"""Messages that ZeroMQ keeps for one peer, on top of what the kernel's socket buffers hold. Incoming ones may have
:data:`xditd.ipc.limits.MAX_MESSAGE_BYTES` each, so there are fewer of them."""

MOST_UNSENT: Final = 64
MOST_UNSENT_BYTES: Final = 256 * 1024
MOST_UNSENT_S: Final = 0.002
"""Replies that wait for the end of a round, at most. A round may serve 256 requests, and the worst that somebody can
send takes several milliseconds to be refused: nobody else's answer should wait for many of them."""

# Plain numbers: combining zmq's enumerations costs several microseconds a message.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)

_send: Final = zmq.backend.Socket.send
"""Without the layer above it, which looks for what only draft socket types have."""


class Delivery(Enum):
    """What became of a message."""

    SENT = "sent"
    NO_ROOM = "no_room"
    """The peer does not read, and as many messages as we keep for it wait already."""
    GONE = "gone"
    """The peer's connection is closed."""


class Envelope(NamedTuple):
    """One message as it arrived. ``peer`` is libzmq's ``localhost:<uid>:<gid>:<pid>``, "" where it is not known."""

    routing_id: bytes
    peer: str
    payload: bytes | None
    """``None`` when the message did not have exactly one frame."""


class Router:
    """A ROUTER for ``path`` of the runtime folder, which only its owner may enter; it serves after :meth:`listen`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self._endpoint = endpoint(path)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.SNDHWM, _SEND_LIMIT)
        self.socket.setsockopt(zmq.RCVHWM, _RECEIVE_LIMIT)

    def listen(self, listener: socket.socket) -> None:
        """Take connections from a socket that listens at the path, too; ZeroMQ owns its descriptor from then on.

        Earlier listeners are kept: ZeroMQ ends every connection that came through one together with it.
        """
        # ZeroMQ then neither binds nor unlinks the path, at no time (libzmq 4.3.5, ipc_listener.cpp).
        self.socket.setsockopt(zmq.USE_FD, listener.detach())
        self.socket.bind(self._endpoint)

    def receive(self) -> Iterator[Envelope]:
        """Yield what has arrived, at most :data:`BATCH` messages."""
        receive = self.socket.recv
        for _ in range(BATCH):
            try:
                routing_id = receive(_NOBLOCK)
            except zmq.Again:
                return
            # The frame itself for the payload: it alone knows the peer. ZeroMQ hands over whole messages, so the
            # frames that follow are there.
            frame: zmq.Frame = receive(_NOBLOCK, False)
            payload: bytes | None = frame.bytes
            while frame.more:
                frame, payload = receive(_NOBLOCK, False), None
            try:
                peer = str(frame.get("Peer-Address"))
            except zmq.ZMQError:
                peer = ""
            yield Envelope(routing_id, peer, payload)

    def send(self, routing_id: bytes, payload: bytes) -> Delivery:
        """Send without ever waiting."""
        try:
            # Where there is no room or no peer, the first frame is refused, so no message is cut in half.
            _send(self.socket, routing_id, _NOBLOCK_MORE)
            _send(self.socket, payload, _NOBLOCK)
        except zmq.Again:
            return Delivery.NO_ROOM
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Delivery.GONE
        return Delivery.SENT

    def close(self, linger_ms: int) -> None:
        self.socket.close(linger=linger_ms)


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
