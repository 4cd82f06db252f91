"""Identify processes by pid and start time, since the kernel reuses pids; peer credentials and exit statuses."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from typing import Annotated, Final

import msgspec

from xditd.ipc.errors import OutOfMemory, ProcessGone
from xditd.ipc.field_types import Count, Described

_UCRED: Final = struct.Struct("3i")


class ProcessIdentity(Described, frozen=True, kw_only=True):
    """A process by pid and start time (clock ticks since boot), unique also when the pid is reused."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    start_ticks: Count


def identify(pid: int) -> ProcessIdentity:
    """Read a live process's identity.

    Raises:
        ProcessGone: no such process, or it is a zombie.
        OutOfMemory: this process has no free descriptor.

    Source: proc(5), /proc/pid/stat, fields 3, 20 and 22; the command name may contain spaces and parentheses.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} has exited") from error
    except OSError as error:
        raise OutOfMemory(f"process {pid}: /proc/{pid}/stat cannot be read: {error.strerror}") from error
    # The same state is shown if the first thread has ended and others still run.
    if fields[0] in (b"Z", b"X") and int(fields[17]) <= 1:
        raise ProcessGone(f"process {pid} is dead")
    return ProcessIdentity(pid=pid, start_ticks=int(fields[19]))


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the peer of a connected Unix socket; pid 0 if it is not visible in this pid namespace.

    For a socket at a path, the peer is the process that called ``listen(2)``.

    Source: unix(7), SO_PEERCRED.
    """
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def age_s() -> float:
    """Return the seconds since this process was started, the start of the interpreter included."""
    began_s = identify(os.getpid()).start_ticks / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s


def is_alive(process: ProcessIdentity) -> bool:
    """Return whether this process, not only its pid, still exists."""
    try:
        return identify(process.pid) == process
    except ProcessGone:
        return False


def describe_exit(status: int) -> str:
    """Describe how a child ended, from its exit status, or the negated number of the signal that killed it."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (by a user, or by the kernel when out of memory: see dmesg)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
