"""Opening another process's descriptor, and being sure whose it was."""

from __future__ import annotations

import os

from xditd.ipc.errors import NotPermitted, ProcessGone, StaleSource
from xditd.ipc.processes import ProcessIdentity, identify


def open_descriptor(exporter: ProcessIdentity, fd: int, *, is_writable: bool, what: str) -> int:
    """Open what ``fd`` means in the exporter; the caller owns the returned descriptor.

    A new open file description is made, so positions and modes are ours. The kernel asks for the
    same user as the exporter's (ptrace access, read mode); a memfd is reachable in no other way that
    leaves nothing behind when its owner is killed.

    Raises:
        ProcessGone: the exporter has exited, or its pid belongs to another process by now.
        StaleSource: the exporter closed the descriptor.
        NotPermitted: the kernel refused (another user, or a process that is not dumpable).

    Source: proc(5), /proc/pid/fd; ptrace(2), "Ptrace access mode checking".
    """
    flags = (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block us
    path = f"/proc/{exporter.pid}/fd/{fd}"
    if identify(exporter.pid) != exporter:
        raise ProcessGone(f"{what}: process {exporter.pid} has exited and its pid was used again")
    try:
        opened = os.open(path, flags)
    except FileNotFoundError as error:
        raise StaleSource(f"{what}: process {exporter.pid} has no descriptor {fd} any more; lend it again") from error
    except PermissionError as error:
        raise NotPermitted(
            f"{what}: {path}: permission denied; client and daemon must run as the same user and see the same /proc"
        ) from error
    except OSError as error:
        raise StaleSource(f"{what}: {path}: {error.strerror}") from error
    # The pid may have been used again between the check and the open.
    if identify(exporter.pid) != exporter:
        os.close(opened)
        raise ProcessGone(f"{what}: process {exporter.pid} exited while its descriptor was being opened")
    return opened
