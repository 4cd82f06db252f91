"""Errors that cross process boundaries, one class for each code.

A class answers two questions: whose fault was it, and may the caller try again? ``Failed.code`` on
the wire maps one to one to a class, so a client raises what the daemon or a worker meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class XditdError(Exception):
    """Root of every error that xditd raises on purpose."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None
    """When the same request is likely to be served, in seconds from now, where the daemon can tell."""
    names: tuple[str, ...] = ()
    """All that the message's lists name, each with what is wrong with it; the message shows five of a list."""

    def __init__(self, *args: object, names: Iterable[str] = ()) -> None:
        super().__init__(*args)
        self.names = tuple(names)

    @property
    def detail(self) -> str:
        return str(self.args[0]) if self.args else ""


# --- The request cannot be served as it is: change it before trying again. ---------------------


class RequestError(XditdError):
    """The request is at fault; the same request fails again."""


class BadMessage(RequestError):
    """Bytes on the socket are not a message of this protocol.

    ``request_id`` is the sender's, where the bytes could be read so far, so that it can be answered.
    """

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
    """No model family recognises the tensor names."""

    code = "unknown_family"


class UnsupportedDtype(RequestError):
    """A tensor has a dtype that the family cannot run."""

    code = "unsupported_dtype"


class Unsupported(RequestError):
    """A feature, layout or backend exists in the field but not here, or is not installed."""

    code = "unsupported"


class UnknownComponent(RequestError):
    """No live loan has this component id: never lent, returned, or its owner is gone."""

    code = "unknown_component"


class UnknownKept(RequestError):
    """The workers keep no tensor of this id for the client: never sent, pushed out, or lost with them."""

    code = "unknown_kept"


class StaleSource(RequestError):
    """Lent bytes are not what was described: the file, segment or allocation changed or went away."""

    code = "stale_source"


class NotFinite(RequestError):
    """What a component computed is NaN or infinite, from sound inputs: its weights are at fault, or overflow does it.

    The message names the component, the result and the step.
    """

    code = "not_finite"


class ForeignGpu(RequestError):
    """A CUDA handle belongs to a GPU on which no worker runs."""

    code = "foreign_gpu"


class LimitExceeded(RequestError):
    """The client asks for more than it may have at a time; the message names the limit and the setting behind it."""

    code = "limit_exceeded"


class NotPermitted(RequestError):
    """The peer's user may not talk to this daemon."""

    code = "not_permitted"


class Closed(RequestError):
    """A client, or what belongs to one, is used after its own program has closed it."""

    code = "closed"


# --- Something else went away or ran out: the same request may work later. ----------------------


class PeerError(XditdError):
    """The other process went away, or had no room."""

    retryable = True


class Busy(PeerError):
    """The queue is full, or this client's share of it. ``retry_after_s`` comes from how long recent requests took."""

    code = "busy"


class WorkersLost(PeerError):
    """The worker group died under the job; the daemon is rebuilding it."""

    code = "workers_lost"


class WorkersUnavailable(PeerError):
    """The worker group could not be started, and the daemon has given up restarting it."""

    code = "workers_unavailable"
    retryable = False


class SessionLost(PeerError):
    """The daemon has no session for this connection: no hello came, or the session was closed, and its loans ended."""

    code = "session_lost"
    retryable = False


class LeaseLost(PeerError):
    """The owner of a lent component exited or took it back before the job ended."""

    code = "lease_lost"
    retryable = False


class ProcessGone(PeerError):
    """A process exited before it could be identified."""

    code = "process_gone"


class OtherRankFailed(PeerError):
    """This rank is sound, but another one refused: its error is the one to report."""

    code = "other_rank_failed"


class OutOfMemory(PeerError):
    """A worker's GPU or host had no room for the job."""

    code = "out_of_memory"


class StorageError(PeerError):
    """The runtime folder cannot be written: its file system is full or read-only, or its parent is gone."""

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
    """A result could not be written where it was wanted. ``kept`` names the files that hold it instead."""

    code = "output_failed"
    kept: tuple[str, ...] = ()


class Internal(XditdError):
    """A defect of xditd: the message names where; please report it with the log."""

    code = "internal"


def _leaves(root: type[XditdError]) -> dict[str, type[XditdError]]:
    found: dict[str, type[XditdError]] = {}
    for cls in root.__subclasses__():
        if "code" in vars(cls):
            found[cls.code] = cls
        found.update(_leaves(cls))
    return found


BY_CODE: dict[str, type[XditdError]] = _leaves(XditdError)


def named(what: str, error: RequestError) -> RequestError:
    """Return the same error with what it is about in front of its message."""
    return type(error)(f"{what}: {error.detail}", names=error.names)


def error_for(code: str, detail: str, retry_after_s: float | None = None, names: Iterable[str] = ()) -> XditdError:
    """Build the error that a ``Failed`` message stands for; an unknown code becomes :class:`Internal`."""
    cls = BY_CODE.get(code)
    if cls is None:
        return Internal(f"unknown error code {code!r}: {detail}", names=names)
    error = cls(detail, names=names)
    error.retry_after_s = retry_after_s
    return error
