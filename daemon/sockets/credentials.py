"""Credentials of a Unix socket's peer (SO_PEERCRED), and the check of its user."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from xditd.ipc.errors import NotPermitted


@dataclass(frozen=True)
class Credentials:
    """User, group and process id of a peer."""

    uid: int
    gid: int
    pid: int


@lru_cache(maxsize=1024)
def parse_credentials(address: str) -> Credentials:
    """Parse libzmq's peer address, ``localhost:<uid>:<gid>:<pid>`` on ``ipc://``.

    Raises:
        NotPermitted: the address names no process.

    Source: libzmq 4.3.5, ``stream_engine_base.cpp`` (SO_PEERCRED).
    """
    try:
        _, uid, gid, pid = address.split(":")
        return Credentials(uid=int(uid), gid=int(gid), pid=int(pid))
    except ValueError:
        raise NotPermitted(f"peer {address!r}: has no process id; connect through the Unix socket") from None


def check_uid(address: str, own_uid: int) -> Credentials:
    """Check that a peer runs as the daemon's own user.

    Raises:
        NotPermitted: another user, or a process that this pid namespace cannot see.
    """
    peer = parse_credentials(address)
    if peer.uid != own_uid:
        raise NotPermitted(f"uid {peer.uid}: this daemon serves uid {own_uid} only; start one as your own user")
    if peer.pid <= 0:
        raise NotPermitted(
            "the client's process is not visible from the daemon, so no memory can be shared with it; "
            "run both in one pid namespace (one container, or --pid=host)"
        )
    return peer
