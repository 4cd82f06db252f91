"""ZeroMQ ROUTER sockets that never block and know each sender's process, and the sender of replies to clients."""

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
"""Messages read from one socket before the loop serves the others."""

_SEND_LIMIT: Final = 256
_RECEIVE_LIMIT: Final = 32
"""High-water marks: messages that ZeroMQ keeps for a peer besides the kernel's buffers; fewer incoming ones: each may
have :data:`xditd.ipc.limits.MAX_MESSAGE_BYTES`."""

MAX_UNSENT: Final = 64
MAX_UNSENT_BYTES: Final = 256 * 1024
MAX_UNSENT_S: Final = 0.002
"""Limits of the replies that wait for the end of a round. A round may serve 256 requests, and a hostile one may take
several milliseconds to refuse: the reply to another client must not wait for many of them."""

# Plain numbers: combining zmq's enumerations costs several microseconds a message.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)

_send: Final = zmq.backend.Socket.send
"""The low-level method: ``zmq.Socket.send`` also handles draft socket types, which costs time."""


class Delivery(Enum):
    """The outcome of sending a message."""

    SENT = "sent"
    NO_ROOM = "no_room"
    """The peer does not read, and its queue is full."""
    GONE = "gone"
    """The peer's connection is closed."""


class Envelope(NamedTuple):
    """A received message. ``peer`` is libzmq's ``localhost:<uid>:<gid>:<pid>``, "" if it is not known."""

    routing_id: bytes
    peer: str
    payload: bytes | None
    """``None`` when the message did not have exactly one frame."""


class Router:
    """A ROUTER socket for ``path`` of the runtime folder; it accepts connections after :meth:`listen`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self._endpoint = endpoint(path)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.SNDHWM, _SEND_LIMIT)
        self.socket.setsockopt(zmq.RCVHWM, _RECEIVE_LIMIT)

    def listen(self, listener: socket.socket) -> None:
        """Also accept connections on a socket that listens at the path; ZeroMQ then owns its descriptor.

        Earlier listeners stay open: ZeroMQ closes a listener's connections together with it.
        """
        # With USE_FD, ZeroMQ neither binds nor unlinks the path (libzmq 4.3.5, ipc_listener.cpp).
        self.socket.setsockopt(zmq.USE_FD, listener.detach())
        self.socket.bind(self._endpoint)

    def receive(self) -> Iterator[Envelope]:
        """Yield the messages that have arrived, at most :data:`BATCH`."""
        receive = self.socket.recv
        for _ in range(BATCH):
            try:
                routing_id = receive(_NOBLOCK)
            except zmq.Again:
                return
            # The payload as a zmq.Frame, which knows the peer. ZeroMQ delivers whole messages, so the next frames are
            # there.
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
        """Send without blocking."""
        try:
            # If the queue is full or the peer is gone, the first frame is refused, so no half message is sent.
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
    """Send replies. Sessions whose client does not read, or is disconnected, go into :attr:`unreachable`.

    The service closes those sessions after the round: closing one changes the jobs and leases that a caller may iterate
    over. Replies of one round of the loop are sent together, in their order, by :meth:`flush`: sent one by one, each
    wakes ZeroMQ's thread again, which took as long as the rest of a request.
    """

    def __init__(self, router: Router, sessions: Sessions) -> None:
        self.sessions = sessions
        self.unreachable: dict[bytes, str] = {}
        self._router = router
        self._unsent: list[tuple[bytes, bytes, bool]] = []
        self._unsent_bytes = 0
        self._unsent_since_s = 0.0

    def reply(self, session: Session, reply: Reply) -> None:
        """Send to a session. A closed one still receives the ends of its jobs, while its connection exists."""
        if self.sessions.find(session.routing_id) is not session:
            self.send_last(session.routing_id, reply)
        elif session.routing_id not in self.unreachable:
            self._queue(session.routing_id, encode(reply), has_session=True)

    def answer(self, routing_id: bytes, reply: Reply) -> None:
        """Send to a connection that may have no session."""
        if routing_id not in self.unreachable:
            self._queue(routing_id, encode(reply), has_session=self.sessions.find(routing_id) is not None)

    def send_last(self, routing_id: bytes, reply: Reply) -> None:
        """Send to a connection without a session; whether it arrives does not matter."""
        self._queue(routing_id, encode(reply), has_session=False)

    def flush(self) -> None:
        """Send the replies that wait for the end of the round."""
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

    def _queue(self, routing_id: bytes, payload: bytes, *, has_session: bool) -> None:
        now = time.monotonic()
        if not self._unsent:
            self._unsent_since_s = now
        self._unsent.append((routing_id, payload, has_session))
        self._unsent_bytes += len(payload)
        if (
            len(self._unsent) >= MAX_UNSENT
            or self._unsent_bytes >= MAX_UNSENT_BYTES
            or now - self._unsent_since_s >= MAX_UNSENT_S
        ):
            self.flush()


def failed(request_id: str, error: XditdError) -> Failed:
    """Convert an error to a ``Failed`` reply."""
    return Failed(
        request_id=request_id,
        code=error.code,
        detail=error.detail[: limits.MAX_TEXT_CHARS],
        retry_after_s=error.retry_after_s,
        names=for_message(error.names),
    )
