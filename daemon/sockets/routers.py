"""The two ROUTER sockets: bounded, never blocking, and aware of who sends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from xditd.ipc import limits
from xditd.ipc.addresses import endpoint

BATCH: Final = 256
"""Messages read from one socket before the others get their turn."""

_SEND_LIMIT: Final = 256
_RECEIVE_LIMIT: Final = 32
"""Messages that ZeroMQ keeps for one peer, on top of what the kernel's socket buffers hold. Incoming ones may have
:data:`xditd.ipc.limits.MAX_MESSAGE_BYTES` each, so there are fewer of them."""

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
