"""Error classes, one for each error code of the protocol.

The class says who caused the error and whether the caller may retry. ``Failed.code`` in a message maps one to one to a
class, so a client raises the same error as the daemon or the worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class XditdError(Exception):
    """Base of every error that xditd raises on purpose."""

    code: ClassVar[str] = "internal"
    retryable: bool = False
    """Whether the same call may work later; an object says it where it knows more than its class."""
    retry_after_s: float | None = None
    """After how many seconds a retry is likely to succeed, if the daemon knows."""
    names: tuple[str, ...] = ()
    """All entries of the message's lists, of which the message shows five each."""

    def __init__(self, *args: object, names: Iterable[str] = ()) -> None:
        super().__init__(*args)
        self.names = tuple(names)

    @property
    def detail(self) -> str:
        return str(self.args[0]) if self.args else ""


# --- The request cannot be served as it is: change it before trying again. ---------------------


class RequestError(XditdError):
    """The request is wrong; the same request fails again."""


class BadMessage(RequestError):
    """Bytes on the socket are not a message of this protocol. ``request_id`` is the sender's, if it could be read."""

    code = "bad_message"
    request_id: str | None = None


class ProtocolMismatch(RequestError):
    """Client and daemon speak different protocol versions."""

    code = "protocol_mismatch"


class BadRequest(RequestError):
    """A field has a value that no job can use (size, steps, NaN, shape)."""

    code = "bad_request"


class BadCheckpoint(RequestError):
    """A checkpoint is malformed, or its tensors are missing, unexpected or wrongly shaped."""

    code = "bad_checkpoint"


class UnknownFamily(RequestError):
    """No model family matches the tensor names."""

    code = "unknown_family"


class UnsupportedDtype(RequestError):
    """A tensor has a dtype that the family cannot run."""

    code = "unsupported_dtype"


class Unsupported(RequestError):
    """xditd does not support a feature, layout or backend, or it is not installed."""

    code = "unsupported"


class UnknownComponent(RequestError):
    """No live loan has this component id: never lent, returned, or its owner is gone."""

    code = "unknown_component"


class UnknownKept(RequestError):
    """The workers keep no tensor of this id for the client: never sent, evicted, or lost with them."""

    code = "unknown_kept"


class StaleSource(RequestError):
    """Lent bytes are not what was described: the file, segment or allocation has changed or no longer exists."""

    code = "stale_source"


class NotFinite(RequestError):
    """A component's result is NaN or infinite although its inputs are finite: bad weights, or an overflow.

    The message names the component, the result and the step.
    """

    code = "not_finite"


class ForeignGpu(RequestError):
    """A CUDA handle belongs to a GPU on which no worker runs."""

    code = "foreign_gpu"


class LimitExceeded(RequestError):
    """The client asks for more than it may have at a time; the message names the limit and its setting."""

    code = "limit_exceeded"


class NotPermitted(RequestError):
    """The peer's user may not use this daemon."""

    code = "not_permitted"


class Closed(RequestError):
    """A client, or an object of it, is used after it was closed."""

    code = "closed"


# --- Another process ended, or a resource ran out: the same request may work later. --------------


class PeerError(XditdError):
    """The other process ended, or had no memory or other resource."""

    retryable = True


class Busy(PeerError):
    """The queue is full, or this client's share of it. ``retry_after_s`` is estimated from recent jobs."""

    code = "busy"


class WorkersLost(PeerError):
    """The worker group ended during the job; the daemon is rebuilding it."""

    code = "workers_lost"


class WorkersUnavailable(PeerError):
    """The worker group could not be started, and the daemon has given up restarting it."""

    code = "workers_unavailable"
    retryable = False


class SessionLost(PeerError):
    """The daemon has no session for this connection: no ``Hello`` was sent, or the session and its loans were ended."""

    code = "session_lost"
    retryable = False


class LeaseLost(PeerError):
    """A lent component ended before its job: returned, revoked, its owner exited, or lost with the workers."""

    code = "lease_lost"
    retryable = False


class ProcessGone(PeerError):
    """A process exited before it could be identified."""

    code = "process_gone"


class OtherRankFailed(PeerError):
    """This rank did not fail, but another one did, whose error is the one to report."""

    code = "other_rank_failed"


class OutOfMemory(PeerError):
    """A worker's GPU or host had not enough memory for the job."""

    code = "out_of_memory"


class StorageError(PeerError):
    """The runtime folder cannot be written: its file system is full or read-only, or its parent does not exist."""

    code = "storage"


class DeadlineExceeded(PeerError):
    """No answer within the deadline."""

    code = "deadline_exceeded"


class DaemonUnreachable(PeerError):
    """No daemon answers on the socket."""

    code = "daemon_unreachable"


class DaemonStopping(PeerError):
    """The daemon is shutting down."""

    code = "daemon_stopping"


class AlreadyRunning(PeerError):
    """Another daemon holds this runtime folder."""

    code = "already_running"
    retryable = False


class Cancelled(XditdError):
    """The caller cancelled the job."""

    code = "cancelled"


class OutputFailed(XditdError):
    """A result could not be written to the requested path. ``kept`` lists the files that hold it instead."""

    code = "output_failed"
    kept: tuple[str, ...] = ()


class Internal(XditdError):
    """A bug in xditd; please report it with the log."""

    code = "internal"


def _classes_by_code(root: type[XditdError]) -> dict[str, type[XditdError]]:
    found: dict[str, type[XditdError]] = {}
    for cls in root.__subclasses__():
        if "code" in vars(cls):
            found[cls.code] = cls
        found.update(_classes_by_code(cls))
    return found


BY_CODE: dict[str, type[XditdError]] = _classes_by_code(XditdError)


def named(what: str, error: RequestError) -> RequestError:
    """Return the same error with ``what`` in front of its message."""
    return type(error)(f"{what}: {error.detail}", names=error.names)


def error_for(code: str, detail: str, retry_after_s: float | None = None, names: Iterable[str] = ()) -> XditdError:
    """Build the error of a ``Failed`` message; an unknown code becomes :class:`Internal`."""
    cls = BY_CODE.get(code)
    if cls is None:
        return Internal(f"unknown error code {code!r}: {detail}", names=names)
    error = cls(detail, names=names)
    error.retry_after_s = retry_after_s
    return error
