"""The connection to the daemon: a background thread owns the ZeroMQ socket, and any number of threads use it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import zmq

from xditd import __version__
from xditd.client.discovery import HINT, DaemonProcess, close_quietly, find_daemon
from xditd.client.forks import maker_of_client
from xditd.client.mailboxes import Mailbox, Timeouts
from xditd.client.waiting import check_seconds
from xditd.ipc import limits
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.awake_clock import TICK_S, AwakeClock
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.errors import (
    BadMessage,
    Closed,
    DaemonUnreachable,
    DeadlineExceeded,
    LeaseLost,
    LimitExceeded,
    SessionLost,
    XditdError,
)
from xditd.ipc.protocol import PROTOCOL_VERSION, Reply, Request
from xditd.ipc.replies import AnyReply, Failed, Welcome
from xditd.ipc.requests import Beat, Hello

R = TypeVar("R", bound=Reply)

HELLO_DEADLINE_S: Final = 2.0
"""The daemon answers ``Hello`` itself, whatever its workers do."""

CONTROL_DEADLINE_S: Final = 10.0
"""Default for requests that the daemon answers without its workers."""

_NEVER_MS: Final = 10**9
_FLUSH_MS: Final = 250
_LAST_REPLY_MS: Final = 100
_SEND_WAIT_S: Final = 0.02
_SEND_POLL_S: Final = 50e-6


class _IoThread:
    """The thread that owns the DEALER socket. It ends when the daemon exits, or after ``close``."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._made_by_pid = os.getpid()
        self._outgoing: deque[bytes] = deque()
        self._mailboxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._callbacks: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self.is_leaving = False
        """Whether this side ends the session: loans and jobs that end then are ended by the caller."""
        self._ends_by_s = math.inf
        self._beat_every_s: float | None = None
        self._beats = itertools.count(1)
        self._sent_s = time.monotonic()
        self.clock = AwakeClock()
        """Measures the time that requests wait; this thread reads it regularly while any request waits."""
        self.loss: Callable[[], XditdError] | None = None
        self.ended = threading.Event()
        # A separate context: forks and other libraries may terminate the shared one.
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # One connection is one session, which a new daemon does not know, so ZeroMQ must not reconnect by itself. The
        # interval is very long instead of -1, because with -1 libzmq 4.3.5 hung in term() for one in ten connections
        # whose daemon was killed while a message was being sent; with this value for none of 540.
        self._socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
        self._socket.connect(endpoint(daemon.socket))
        self.thread = threading.Thread(target=self._run, name="xditd-connection", daemon=True)
        try:
            self.thread.start()
        except BaseException:  # an interrupt while it waits for the thread, which runs then
            self.close()
            raise

    def post(self, mailbox: Mailbox, payload: bytes) -> None:
        """Queue a message for sending; its replies go to ``mailbox``. Safe in any thread."""
        with self._lock:
            if self.loss is not None:
                raise self.loss()
            self._mailboxes[mailbox.request_id] = mailbox
            self._outgoing.append(payload)
            os.eventfd_write(self._wake_fd, 1)

    def wait_sent(self) -> None:
        """Wait until all messages are handed to ZeroMQ, at most :data:`_SEND_WAIT_S`."""
        ends_s = time.monotonic() + _SEND_WAIT_S
        while self._outgoing and time.monotonic() < ends_s:
            time.sleep(_SEND_POLL_S)  # lets the connection's thread run: it needs the interpreter's lock

    def start_beating(self, every_s: float) -> None:
        """Send a ``Beat`` whenever nothing else was sent for ``every_s``: the daemon ends silent sessions."""
        self._beat_every_s = every_s
        with self._lock:
            if self.loss is None:
                os.eventfd_write(self._wake_fd, 1)

    def run_soon(self, callback: Callable[[], None]) -> None:
        """Run a function on the connection's thread, at the latest with the next beat.

        Takes no lock that it has to wait for, because finalizers run at any point of any thread. Does nothing once
        the loop has ended, and in a fork.
        """
        if os.getpid() != self._made_by_pid:
            return
        self._callbacks.append(callback)
        # The descriptor is closed under this lock. Its holder wakes the loop, is the loop, or is this thread.
        if self._lock.acquire(blocking=False):
            try:
                if not self.ended.is_set():
                    os.eventfd_write(self._wake_fd, 1)
            finally:
                self._lock.release()

    def end_within(self, deadline_s: float) -> None:
        """End the loop at its first iteration after a deadline, even if requests still wait."""
        self._ends_by_s = time.monotonic() + deadline_s

    def close(self) -> None:
        """Ask the loop to end. Safe in any thread, and to call twice; does nothing in a fork."""
        if os.getpid() != self._made_by_pid:
            return
        with self._lock:
            self._is_closing = True
            if not self.ended.is_set():
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        poller.register(self._daemon.pidfd, zmq.POLLIN)
        socket, pid = self._daemon.socket, self._daemon.pid
        loss: Callable[[], XditdError] = lambda: Closed(  # noqa: E731 - a new error for each waiting thread
            f"socket {socket}: this client is closed; make a new Client"
        )
        try:
            while not self._is_closing and time.monotonic() < self._ends_by_s:
                self._run_callbacks()
                ready = dict(poller.poll(self._poll_timeout_ms()))
                self.clock.now_s()
                if self._wake_fd in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                if self._daemon.pidfd in ready:
                    # ZeroMQ's own thread may not have delivered the last messages (such as the reply to Stop) yet.
                    while self._socket.poll(_LAST_REPLY_MS):
                        self._receive()
                    loss = lambda: DaemonUnreachable(  # noqa: E731
                        f"socket {socket}: the daemon (pid {pid}) has exited; {HINT}"
                    )
                    break
                if self._socket in ready:
                    self._receive()
                self._send()
                poller.modify(self._socket, zmq.POLLIN | zmq.POLLOUT if self._outgoing else zmq.POLLIN)
            else:
                self._send()
        except SessionLost as error:
            gone = f"socket {socket}: the daemon (pid {pid}) has ended this session: {error.detail}"
            loss = lambda: SessionLost(gone)  # noqa: E731
        except BadMessage as error:
            detail = f"socket {socket}: the daemon sent an invalid message: {error.detail}"
            loss = lambda: BadMessage(detail)  # noqa: E731
        finally:
            self._end(loss)

    def _run_callbacks(self) -> None:
        while self._callbacks:
            self._callbacks.popleft()()

    def _receive(self) -> None:
        """Deliver all received messages to the mailboxes; replies without a mailbox are dropped."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 1:
                raise BadMessage(f"{len(frames)} frames instead of 1")
            reply: AnyReply = reply_decoder.decode(frames[0])
            with self._lock:
                mailbox = self._mailboxes.get(reply.request_id)
            if mailbox is not None and mailbox.deliver(self._as_caller_sees(reply, mailbox.purpose)):
                with self._lock:
                    self._mailboxes.pop(reply.request_id, None)
            if isinstance(reply, Failed) and reply.code == SessionLost.code:
                raise SessionLost(reply.detail)

    def _as_caller_sees(self, reply: AnyReply, purpose: str) -> AnyReply | Closed:
        """Return a reply, or ``Closed`` if a job lost its loans because this client closes."""
        if self.is_leaving and isinstance(reply, Failed) and reply.code == LeaseLost.code:
            return Closed(f"{purpose}: this client was closed before it was done; make a new Client")
        return reply

    def _poll_timeout_ms(self) -> int | None:
        """Time until the next beat is due, or until the clock has to be read while a request waits."""
        rests_s = [TICK_S] if self._mailboxes else []
        if self._beat_every_s is not None:
            rests_s.append(self._send_beat_if_due(self._beat_every_s))
        return math.ceil(min(rests_s) * 1000) if rests_s else None

    def _send_beat_if_due(self, every_s: float) -> float:
        """Send a ``Beat`` if one is due; returns the seconds until the next one."""
        rest_s = self._sent_s + every_s - time.monotonic()
        if rest_s > 0:
            return rest_s
        # No mailbox gets the reply. A ``Failed`` with the code of SessionLost ends this connection.
        self._outgoing.append(encode(Beat(request_id=f"beat-{next(self._beats)}")))
        self._send()
        return every_s

    def _send(self) -> None:
        while self._outgoing:
            self._sent_s = time.monotonic()
            try:
                self._socket.send(self._outgoing[0], zmq.NOBLOCK)
            except zmq.Again:  # the daemon does not read: the caller's deadline applies
                return
            self._outgoing.popleft()

    def _end(self, loss: Callable[[], XditdError]) -> None:
        with self._lock:
            self.loss = loss
            self.ended.set()
            waiting = list(self._mailboxes.values())
            self._mailboxes.clear()
            close_quietly(self._wake_fd)
            close_quietly(self._daemon.pidfd)
        # Before the ZeroMQ socket is closed, so that waiting threads need not wait for that.
        for mailbox in waiting:
            mailbox.deliver(loss())
        self._run_callbacks()
        # Send what is still queued (a Goodbye, a Cancel), unless the daemon has exited.
        self._socket.close(linger=_FLUSH_MS if self._is_closing else 0)
        self._context.term()


class Connection:
    """One session with one daemon process, from ``Hello`` until either side closes.

    Safe to use from several threads. When the daemon exits, every waiting request fails within a second with
    :class:`DaemonUnreachable`, and so does every later one: make a new connection. After ``close()`` requests raise
    :class:`Closed`.

    Raises:
        DaemonUnreachable: no process listens, or no reply to ``Hello`` within ``hello_deadline_s``.
        ProtocolMismatch: client and daemon use different protocol versions.
        NotPermitted: the daemon serves another user.
    """

    def __init__(self, runtime: RuntimeDir, *, client_name: str, hello_deadline_s: float = HELLO_DEADLINE_S) -> None:
        self.runtime = runtime
        self.maker = maker_of_client()
        self._prefix = os.urandom(6).hex()
        self._numbers = itertools.count(1)
        self._max_message_bytes = limits.MAX_MESSAGE_BYTES
        self._io = _IoThread(find_daemon(runtime))
        self._finalizer = weakref.finalize(self, self._io.run_soon, self._io.close)
        try:
            self.welcome = self._send_hello(client_name, hello_deadline_s)
            self._io.start_beating(self.welcome.beat_every_s)
            self._max_message_bytes = min(self._max_message_bytes, self.welcome.max_message_bytes)
        except BaseException:
            self.close()
            raise

    def _send_hello(self, client_name: str, deadline_s: float) -> Welcome:
        hello = Hello(
            request_id=self.next_request_id(),
            protocol_version=PROTOCOL_VERSION,
            package_version=__version__,
            client_name=client_name,
        )
        try:
            return self.ask(hello, Welcome, deadline_s=deadline_s)
        except DeadlineExceeded:
            raise DaemonUnreachable(
                f"socket {self.runtime.client_socket}: no daemon answered within {deadline_s:.1f} s; {HINT}"
            ) from None

    @property
    def is_lost(self) -> bool:
        """Whether the daemon has exited, or this side has closed."""
        return self._io.ended.is_set()

    def run_soon(self, callback: Callable[[], None]) -> None:
        """Run a function that does not block on the connection's thread. Safe in finalizers."""
        self._io.run_soon(callback)

    def end_within(self, deadline_s: float) -> None:
        """Close the connection after a deadline, unless it is closed before."""
        self._io.end_within(deadline_s)

    def leave(self) -> None:
        """Let requests whose loans end from now on fail with ``Closed``: this side ends the session."""
        self._io.is_leaving = True

    def next_request_id(self) -> str:
        return f"{self._prefix}-{next(self._numbers)}"

    def submit(self, request: Request, purpose: str | None = None) -> Mailbox:
        """Send a request and return the mailbox for its replies, without waiting.

        Raises:
            LimitExceeded: the encoded request is larger than the daemon accepts.
            DaemonUnreachable: the daemon has exited.
            Closed: this side has closed.
            Unsupported: this is a fork of the process that made the connection.
        """
        self.maker.check()
        payload = encode(request)
        if len(payload) > self._max_message_bytes:
            # The daemon would not read the request id, so it could not reply, and ZeroMQ might drop the message.
            raise LimitExceeded(
                f"request {type(request).__name__}: {len(payload)} bytes, at most {self._max_message_bytes} are read; "
                "lend a component in fewer, larger blocks, or have the operator raise message_bytes"
            )
        mailbox = Mailbox(request.request_id, purpose or f"request {type(request).__name__}", self._io.clock)
        self._io.post(mailbox, payload)
        return mailbox

    def ask(self, request: Request, reply_type: type[R], *, deadline_s: float = CONTROL_DEADLINE_S) -> R:
        """Send a request and wait for its reply, at most ``deadline_s`` in total.

        Raises:
            XditdError: the error that the daemon answered, or :class:`DeadlineExceeded`.
        """
        check_seconds("deadline_s", deadline_s)
        return self.submit(request).wait(reply_type, Timeouts(silence_s=deadline_s, total_s=deadline_s))

    def wait_sent(self) -> None:
        """Wait until what was submitted is sent, for callers that compute in Python next.

        The connection's thread would have to wait for the interpreter, 5 ms at a time
        (``sys.getswitchinterval``).
        """
        self._io.wait_sent()

    def wait_lost(self, deadline_s: float) -> bool:
        """Wait until the daemon has exited; returns whether it has."""
        clock = AwakeClock()
        began_s = clock.now_s()
        while (rest_s := deadline_s - clock.waited_s(began_s)) > 0:
            if self._io.ended.wait(min(TICK_S, rest_s)):
                return True
        return self._io.ended.is_set()

    def close(self) -> None:
        """Close the socket. Waiting requests fail. Does nothing in a fork."""
        self._finalizer.detach()
        if not self.maker.is_here:
            return
        self._io.close()
        if threading.current_thread() is not self._io.thread:
            self._io.thread.join(timeout=CONTROL_DEADLINE_S)
