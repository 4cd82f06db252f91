"""Load a ZeroMQ server with cheap clients: plain Unix sockets that speak ZMTP as DEALERs.

A hundred libzmq sockets in one process use more of two cores than the measured server. These clients need two system
calls a message and no second thread, so the measured time is the server's.

Source: ZMTP 3.1 (rfc.zeromq.org/spec/37), "Greeting", "NULL", "Framing".
"""

from __future__ import annotations

import select
import socket
import statistics
import struct
import time
from collections.abc import Callable
from typing import Final

from lends_and_jobs import cpu_s

_GREETING: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY: Final = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
_LONG: Final = 0x02
_COMMAND: Final = 0x04
_CHUNK_BYTES: Final = 65_536

PACED_PER_S = 5_000
"""Requests a second of all clients together, sent in turn without waiting for answers."""


def make_frame(body: bytes, flags: int = 0) -> bytes:
    """Return one ZMTP frame, short or long."""
    if len(body) > 255:
        return struct.pack(">BQ", flags | _LONG, len(body)) + body
    return struct.pack(">BB", flags, len(body)) + body


class ZmtpClient:
    """One connection. ``sent_s`` are the times of the pending requests, the oldest first."""

    def __init__(self, path: str, wait_s: float = 20.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sent_s: list[float] = []
        self._unread = b""
        ends_s = time.monotonic() + wait_s
        while True:
            try:
                self.socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > ends_s:
                    raise
                time.sleep(0.005)  # the server is starting; connect(2) does not wait for a listener
        self.socket.sendall(_GREETING + make_frame(_READY, _COMMAND))
        while len(self._unread) < len(_GREETING):
            self._read()
        self._unread = self._unread[len(_GREETING) :]

    def send(self, frame: bytes, due_s: float | None = None) -> None:
        """Send a frame, which is small, so the kernel takes it whole unless the server stops reading."""
        self.sent_s.append(time.perf_counter() if due_s is None else due_s)
        if self.socket.send(frame) != len(frame):
            raise SystemExit("the server does not read its requests")

    def receive(self) -> list[bytes]:
        """Read once, and return the messages that are complete."""
        self._read()
        found = []
        data, at = self._unread, 0
        while len(data) - at >= 2:
            flags = data[at]
            head = 9 if flags & _LONG else 2
            if len(data) - at < head:
                break
            size = int.from_bytes(data[at + 1 : at + head], "big")
            if len(data) - at < head + size:
                break
            if not flags & _COMMAND:
                found.append(data[at + head : at + head + size])
            at += head + size
        self._unread = data[at:]
        return found

    def ask(self, body: bytes) -> bytes:
        """Send one message and wait for the answer."""
        self.socket.sendall(make_frame(body))
        while not (found := self.receive()):
            pass
        return found[0]

    def close(self) -> None:
        self.socket.close()

    def _read(self) -> None:
        chunk = self.socket.recv(_CHUNK_BYTES)
        if not chunk:
            raise SystemExit("the server closed a connection of the benchmark")
        self._unread += chunk


def load(
    connections: list[ZmtpClient], pid: int, payload: bytes, window: int, seconds: float, check: Callable[[bytes], None]
) -> dict[str, float]:
    """Load a server with ``window`` pending requests on each connection, time the answers, and close the connections.

    With a window of 0 they send :data:`PACED_PER_S` together, and latency starts when a request was due, so that late
    sends count. ``check`` gets every thousandth answer.
    """
    frame = make_frame(payload)
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    latencies_ms: list[float] = []
    due = 0
    used_s, own_s = cpu_s(pid), time.process_time()
    with select.epoll() as epoll:
        for descriptor, connection in by_descriptor.items():
            epoll.register(descriptor, select.EPOLLIN)
            for _ in range(window):
                connection.send(frame)
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < seconds:
            while not window and due / PACED_PER_S <= now:
                connections[due % len(connections)].send(frame, began + due / PACED_PER_S)
                due += 1
            wait_s = 1.0 if window else max(0.0, due / PACED_PER_S - (time.perf_counter() - began))
            for descriptor, _ in epoll.poll(wait_s):
                connection = by_descriptor[descriptor]
                for answer in connection.receive():
                    latencies_ms.append((time.perf_counter() - connection.sent_s.pop(0)) * 1000)
                    if len(latencies_ms) % 1_000 == 1:
                        check(answer)
                    if window:
                        connection.send(frame)
    used_s, own_s = cpu_s(pid) - used_s, time.process_time() - own_s
    for connection in connections:
        connection.close()
    ordered = sorted(latencies_ms)
    return {
        "per_s": len(ordered) / seconds,
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "server_cpu_us": used_s / len(ordered) * 1e6,
        "client_cpu_us": own_s / len(ordered) * 1e6,
    }
