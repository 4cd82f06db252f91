"""Minimal HTTP server for metrics in the daemon's event loop; it never blocks.

Source: RFC 1945 (HTTP/1.0). One request a connection, which is what a scraper needs.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Final

from xditd.daemon.operations.event_loop import Deadline, EventLoop
from xditd.ipc.errors import AlreadyRunning, BadRequest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The format of ``prometheus_client.exposition.generate_latest``."""

MAX_CONNECTIONS: Final = 16
MAX_REQUEST_BYTES: Final = 8 * 1024
DEADLINE_S: Final = 5.0
"""From connection to the last byte; a slower scraper is disconnected."""


class _Scraper:
    """One connection: the request so far, and the rest of the answer."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self.connection = connection
        self.deadline = deadline
        self.request = b""
        self.answer = b""


class MetricsServer:
    """Answer ``GET /metrics`` with what ``write`` returns."""

    def __init__(self, loop: EventLoop, write: Callable[[], str]) -> None:
        self._loop = loop
        self._write = write
        self._scrapers: dict[int, _Scraper] = {}
        self._listener: socket.socket | None = None

    def listen(self, listener: socket.socket) -> None:
        """Accept connections on this socket, which the server then owns, in place of an earlier one."""
        self._stop_listening()
        self._listener = listener
        self._loop.watch(listener.fileno(), self._accept)

    def close(self) -> None:
        for fd in list(self._scrapers):
            self._drop(fd)
        self._stop_listening()

    @property
    def address(self) -> str:
        """Where metrics are served, for the log."""
        assert self._listener is not None
        if self._listener.family == socket.AF_UNIX:
            return f"unix:{self._listener.getsockname()}"
        return "http://{}:{}/metrics".format(*_host_and_port(self._listener))

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the scraper has disconnected, or no descriptor is free: it tries again
            return
        if len(self._scrapers) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        fd = connection.fileno()
        self._scrapers[fd] = _Scraper(connection, self._loop.deadline(DEADLINE_S, lambda: self._drop(fd)))
        self._loop.watch(fd, lambda: self._read(fd))

    def _read(self, fd: int) -> None:
        scraper = self._scrapers[fd]
        try:
            part = scraper.connection.recv(MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._drop(fd)
            return
        scraper.request += part
        is_complete = b"\r\n\r\n" in scraper.request or b"\n\n" in scraper.request
        if not part or len(scraper.request) > MAX_REQUEST_BYTES:
            self._drop(fd)
        elif is_complete:
            scraper.answer = self._respond(scraper.request)
            self._loop.unwatch(fd)
            self._loop.watch(fd, lambda: self._send(fd), writable=True)
            self._send(fd)

    def _send(self, fd: int) -> None:
        scraper = self._scrapers[fd]
        try:
            scraper.answer = scraper.answer[scraper.connection.send(scraper.answer) :]
        except BlockingIOError:
            return
        except OSError:
            scraper.answer = b""
        if not scraper.answer:
            self._drop(fd)

    def _respond(self, request: bytes) -> bytes:
        words = request.split(b"\r\n", 1)[0].split()
        method, path = words[:2] if len(words) >= 2 else (b"", b"")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "only GET\n", with_body=True)
        if path.partition(b"?")[0] not in (b"/metrics", b"/"):
            return _response("404 Not Found", "only /metrics\n", with_body=method == b"GET")
        return _response("200 OK", self._write(), with_body=method == b"GET")

    def _drop(self, fd: int) -> None:
        scraper = self._scrapers.pop(fd, None)
        if scraper is not None:
            scraper.deadline.stop()
            self._loop.unwatch(fd)
            # Without this, bytes that were sent and not yet read could be lost with the connection.
            with contextlib.suppress(OSError):
                scraper.connection.shutdown(socket.SHUT_WR)
            scraper.connection.close()


def _response(status: str, body: str, *, with_body: bool) -> bytes:
    content = body.encode()
    head = f"HTTP/1.0 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + (content if with_body else b"")


def listen_on_loopback(address: tuple[str, int]) -> socket.socket:
    """Return a socket that listens on a loopback address and port.

    Raises:
        AlreadyRunning: the port is taken.
        BadRequest: this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        where = f"metrics address {address}"
        if error.errno == errno.EADDRINUSE:
            raise AlreadyRunning(f'{where}: in use; choose another port (--metrics), or "unix"') from error
        raise BadRequest(f'{where}: {error.strerror}; choose another (--metrics), or "unix"') from error
    return listener


def _host_and_port(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    return (f"[{host}]" if ":" in host else host), port
