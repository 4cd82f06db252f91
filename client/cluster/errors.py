"""Errors of a cluster, and which errors are those of one host, so that another host may run the job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from xditd.ipc.errors import (
    Busy,
    DaemonStopping,
    DaemonUnreachable,
    LeaseLost,
    OutOfMemory,
    PeerError,
    ProcessGone,
    SessionLost,
    StaleSource,
    StorageError,
    UnknownComponent,
    WorkersLost,
    WorkersUnavailable,
    XditdError,
    error_for,
)


class HostLost(PeerError):
    """A host of the cluster, its agent or the link to it was lost during the job."""

    code = "host_lost"


class ClusterUnreachable(PeerError):
    """No cluster answers at the address, or its router does not."""

    code = "cluster_unreachable"


HOST_FAULTS: Final = (
    Busy,
    DaemonStopping,
    DaemonUnreachable,
    HostLost,
    LeaseLost,
    OutOfMemory,
    ProcessGone,
    SessionLost,
    StaleSource,
    StorageError,
    UnknownComponent,
    WorkersLost,
    WorkersUnavailable,
)
"""Errors after which a job is run once on another host. All others would be the same there."""

_OWN: Final = {each.code: each for each in (HostLost, ClusterUnreachable)}


def error_named(code: str, detail: str, retry_after_s: float | None, names: Iterable[str]) -> XditdError:
    """Build the error of a code, also of a cluster's."""
    own = _OWN.get(code)
    if own is None:
        return error_for(code, detail, retry_after_s, names)
    error = own(detail, names=names)
    error.retry_after_s = retry_after_s
    return error
