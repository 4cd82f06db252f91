"""Find the daemon of a runtime folder, before ZeroMQ connects.

ZeroMQ's ``connect()`` succeeds even if no process listens, and queues messages. A plain ``connect(2)`` fails at once,
and gives the pid of the listening process, so that its exit can be watched by a pidfd.
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
"""For a daemon that systemd starts by socket activation: it binds in well under a second on a warm disk."""

_PROBE_DEADLINE_S: Final = 2.0
_ACTIVATION_POLL_S: Final = 0.05
_ACTIVATION_POLL_MAX_S: Final = TICK_S
"""Each poll is a connection that waits in the socket's backlog until the daemon accepts it: a few dozen at most."""


@dataclass(frozen=True)
class DaemonProcess:
    """The process that listens on ``socket``. ``pidfd`` is readable once it has exited; the caller closes it."""

    socket: Path
    pid: int
    pidfd: int


def find_daemon(runtime: RuntimeDir) -> DaemonProcess:
    """Find the process that listens on the daemon's socket; if it is systemd, wait until the daemon takes over.

    Raises:
        DaemonUnreachable: no socket, no process listens on it, or systemd did not start the daemon in time.
        NotPermitted: the socket belongs to another user, or may not be opened.
        Unsupported: the daemon runs in a pid namespace that is not visible here.
    """
    runtime.check_socket_paths()
    path = runtime.client_socket
    clock = AwakeClock()
    began_s = clock.now_s()
    pause_s = _ACTIVATION_POLL_S
    while True:
        pid, uid = _find_listener(path)
        if pid and not _is_systemd(pid, uid):
            _check_owner(path, uid)
            # The connection worked, so if the process is gone, systemd holds the socket and starts the next daemon.
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
        # systemd does not notify clients when the service is up, but then another process listens on the socket.
        time.sleep(pause_s)
        pause_s = min(_ACTIVATION_POLL_MAX_S, pause_s * 1.3)


def _find_listener(path: Path) -> tuple[int, int]:
    """Return the pid and uid of the process that listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_DEADLINE_S)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            raise DaemonUnreachable(f"socket {path}: no such socket; {HINT}") from None
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
        # /tmp is shared: another user who made the folder first could imitate the daemon.
        raise NotPermitted(
            f"socket {path}: served by uid {uid}, not by uid {os.getuid()}; name your own daemon's folder "
            "(--runtime-dir or XDITD_RUNTIME_DIR)"
        )


def _is_systemd(pid: int, uid: int) -> bool:
    """Return whether the process is systemd, the system's or this user's own."""
    if uid not in (0, os.getuid()):
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "systemd"
    return False


def close_quietly(descriptor: int) -> None:
    """Close a descriptor and ignore errors."""
    with contextlib.suppress(OSError):
        os.close(descriptor)
