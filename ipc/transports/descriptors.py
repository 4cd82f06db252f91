"""Open a file descriptor of another process through ``/proc``, after checking the process's identity."""

from __future__ import annotations

import errno
import os
from typing import Final

from xditd.ipc.errors import NotPermitted, OutOfMemory, ProcessGone, StaleSource, XditdError
from xditd.ipc.processes import ProcessIdentity, identify

NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def refusal(what: str, error: Exception) -> XditdError:
    """Build the error: ``OutOfMemory`` if this process lacks memory or descriptors, else ``StaleSource``."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return OutOfMemory(f"{what}: {error.strerror} in this process")
    return StaleSource(f"{what}: cannot be mapped: {error}")


def open_descriptor(exporter: ProcessIdentity, fd: int, *, is_writable: bool, what: str) -> int:
    """Open the file that ``fd`` names in the exporter; the caller owns the returned descriptor.

    It is a new open file description, with its own position and mode. The kernel requires the same user as the
    exporter's (ptrace access, read mode). Other ways to share a memfd leave something behind when its owner is killed.

    Raises:
        ProcessGone: the exporter has exited, or its pid belongs to another process.
        StaleSource: the exporter closed the descriptor.
        NotPermitted: the kernel refused (another user, or a process that is not dumpable).
        OutOfMemory: this process has no free descriptor.

    Source: proc(5), /proc/pid/fd; ptrace(2), "Ptrace access mode checking".
    """
    # A FIFO must not block, and a terminal must not become the controlling one.
    flags = (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    path = f"/proc/{exporter.pid}/fd/{fd}"
    if identify(exporter.pid) != exporter:
        raise ProcessGone(f"{what}: process {exporter.pid} has exited and its pid was reused")
    try:
        opened = os.open(path, flags)
    except FileNotFoundError as error:
        raise StaleSource(f"{what}: process {exporter.pid} has no descriptor {fd} any more; lend it again") from error
    except PermissionError as error:
        raise NotPermitted(
            f"{what}: {path}: permission denied; client and daemon must run as the same user and see the same /proc"
        ) from error
    except OSError as error:
        raise refusal(what, error) from error
    # The pid may have been reused between the check and the open.
    try:
        if identify(exporter.pid) != exporter:
            raise ProcessGone(f"{what}: process {exporter.pid} exited while its descriptor was being opened")
    except XditdError:
        os.close(opened)
        raise
    return opened
