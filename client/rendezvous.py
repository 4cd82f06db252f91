"""Find the daemon behind a runtime folder, before ZeroMQ is involved.

ZeroMQ's ``connect()`` to nothing succeeds and queues in silence. A plain ``connect(2)`` answers at once,
and names the process at the other end, so its death can be watched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import DaemonUnreachable, NotPermitted, Unsupported

HINT = "is it running? (xditd serve, or systemctl --user status xditd)"
_PROBE_DEADLINE_S = 2.0
_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class DaemonProcess:
    """The process that listens on ``socket``. ``pidfd`` is readable once it has exited; the holder closes it."""

    socket: Path
    pid: int
    pidfd: int


def find_daemon(runtime: RuntimeDir) -> DaemonProcess:
    """Identify the process that listens on the daemon's socket.

    Raises:
        DaemonUnreachable: no socket, or nobody listens on it.
        NotPermitted: the socket belongs to another user, or may not be opened.
        Unsupported: the daemon's process cannot be seen from here.

    Source: unix(7), SO_PEERCRED: the credentials are those of the process that called ``listen(2)``,
    its pid as this process's pid namespace numbers it, 0 where it has no number there.
    """
    runtime.check_lengths()
    path = runtime.client_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_DEADLINE_S)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            raise DaemonUnreachable(f"socket {path}: no such socket; no daemon here: {HINT}") from None
        except ConnectionRefusedError:
            raise DaemonUnreachable(
                f"socket {path}: connection refused; the daemon that made it has exited: {HINT}"
            ) from None
        except PermissionError:
            raise NotPermitted(
                f"socket {path}: permission denied for uid {os.getuid()}; the daemon serves its own user only"
            ) from None
        except TimeoutError:
            raise DaemonUnreachable(
                f"socket {path}: the daemon accepts no connections for {_PROBE_DEADLINE_S:.1f} s; {HINT}"
            ) from None
        except OSError as error:
            raise DaemonUnreachable(f"socket {path}: {error.strerror or error}; {HINT}") from None
        pid, uid, _ = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.getuid():
        # /tmp is shared: whoever made the folder first could pose as our daemon.
        raise NotPermitted(
            f"socket {path}: served by uid {uid}, not by uid {os.getuid()}; name your own daemon's folder "
            "(--runtime-dir or XDITD_RUNTIME_DIR)"
        )
    if pid == 0:
        raise Unsupported(
            f"socket {path}: the daemon's process is not visible from here, so no memory can be shared with it; "
            "run client and daemon in one pid namespace (one container, or --pid=host)"
        )
    try:
        return DaemonProcess(socket=path, pid=pid, pidfd=os.pidfd_open(pid))
    except ProcessLookupError:
        raise DaemonUnreachable(f"socket {path}: the daemon (pid {pid}) has just exited; {HINT}") from None


def close_quietly(descriptor: int) -> None:
    """Close a descriptor that may be closed already."""
    with contextlib.suppress(OSError):
        os.close(descriptor)
