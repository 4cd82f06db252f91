"""Find the daemon behind a runtime folder, before ZeroMQ is involved.

ZeroMQ's ``connect()`` to nothing succeeds and queues in silence. A plain ``connect(2)`` answers at once,
and names the process at the other end, so its death can be watched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.awake_clock import TICK_S, AwakeClock
from xditd.ipc.errors import DaemonUnreachable, NotPermitted, Unsupported
from xditd.ipc.processes import peer_credentials

HINT = "is it running? (xditd serve, or systemctl --user status xditd)"
ACTIVATION_DEADLINE_S: Final = 20.0
"""For a daemon that a service manager starts because we knocked: it binds in well under a second on a warm disk."""

_PROBE_DEADLINE_S: Final = 2.0
_ACTIVATION_POLL_S: Final = 0.05
_ACTIVATION_POLL_MAX_S: Final = TICK_S
"""Each look is a connection, which the socket's queue holds until the daemon takes it: a few dozen at most."""


@dataclass(frozen=True)
class DaemonProcess:
    """The process that listens on ``socket``. ``pidfd`` is readable once it has exited; the holder closes it."""

    socket: Path
    pid: int
    pidfd: int


def find_daemon(runtime: RuntimeDir) -> DaemonProcess:
    """Identify the process that listens on the daemon's socket; where systemd does so, wait until the daemon has it.

    Raises:
        DaemonUnreachable: no socket, or nobody listens on it, or systemd did not get the daemon started.
        NotPermitted: the socket belongs to another user, or may not be opened.
        Unsupported: the daemon's process cannot be seen from here.
    """
    runtime.check_lengths()
    path = runtime.client_socket
    clock = AwakeClock()
    began_s = clock.now_s()
    pause_s = _ACTIVATION_POLL_S
    while True:
        pid, uid = _who_listens(path)
        if pid and not _is_service_manager(pid, uid):
            _check_owner(path, uid)
            # Connecting worked, so if the process that listened is gone, somebody else holds its socket: a service
            # manager, which starts the next daemon because of our connection.
            with contextlib.suppress(ProcessLookupError):
                return DaemonProcess(socket=path, pid=pid, pidfd=os.pidfd_open(pid))
        elif pid == 0:
            _check_owner(path, uid)
            raise Unsupported(
                f"socket {path}: the daemon's process is not visible from here, so no memory can be shared with it; "
                "run client and daemon in one pid namespace (one container, or --pid=host)"
            )
        if clock.waited_s(began_s) >= ACTIVATION_DEADLINE_S:
            raise DaemonUnreachable(
                f"socket {path}: systemd listens, but no daemon took over within {ACTIVATION_DEADLINE_S:.0f} s; "
                "see journalctl --user -u xditd"
            )
        # A manager tells nobody when its service is up: the socket's owner changes then.
        time.sleep(pause_s)
        pause_s = min(_ACTIVATION_POLL_MAX_S, pause_s * 1.3)


def _who_listens(path: Path) -> tuple[int, int]:
    """Return pid and uid of whoever listens."""
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
        return peer_credentials(probe)


def _check_owner(path: Path, uid: int) -> None:
    if uid != os.getuid():
        # /tmp is shared: whoever made the folder first could pose as our daemon.
        raise NotPermitted(
            f"socket {path}: served by uid {uid}, not by uid {os.getuid()}; name your own daemon's folder "
            "(--runtime-dir or XDITD_RUNTIME_DIR)"
        )


def _is_service_manager(pid: int, uid: int) -> bool:
    """Whether systemd, the system's or this user's own, still listens in the daemon's place."""
    if uid not in (0, os.getuid()):
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "systemd"
    return False


def close_quietly(descriptor: int) -> None:
    """Close a descriptor that may be closed already."""
    with contextlib.suppress(OSError):
        os.close(descriptor)
