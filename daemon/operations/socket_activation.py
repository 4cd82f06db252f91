"""The clients' socket, handed over by a service manager that has been listening in the daemon's place.

Source: sd_listen_fds(3): ``LISTEN_PID`` names the process that is meant, ``LISTEN_FDS`` counts descriptors from 3 on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from xditd.daemon.operations.socket_files import BACKLOG
from xditd.ipc.errors import BadRequest

FIRST_FD: Final = 3


def take_listener(
    environ: MutableMapping[str, str], pid: int, path: Path, first_fd: int = FIRST_FD
) -> socket.socket | None:
    """Take the listening socket of ``path`` over; ``None`` where this daemon has to bind by itself.

    The variables are removed from ``environ``: workers must not believe that they are meant. The caller owns the
    socket, which does not block and is closed on exec.

    Raises:
        BadRequest: other than one listening Unix socket was handed over, or one of another path, or its file is gone.
    """
    count = environ.pop("LISTEN_FDS", "")
    meant_for = environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not count or meant_for != str(pid):
        return None
    if count != "1":
        raise BadRequest(
            f"LISTEN_FDS={count}: the daemon takes one socket, {path}; give the socket unit one ListenStream"
        )
    try:
        listener = socket.socket(fileno=first_fd)
        is_sound = listener.family == socket.AF_UNIX and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        found = listener.getsockname()
    except OSError as error:
        raise BadRequest(
            f"LISTEN_FDS=1: descriptor {first_fd}: {error.strerror}; start through a socket unit"
        ) from error
    if not is_sound or found != os.fspath(path):
        raise BadRequest(
            f"LISTEN_FDS=1: descriptor {first_fd} is not a socket that listens on {path} but on {found!r}; "
            "use the same folder in ListenStream and in --runtime-dir"
        )
    if not os.path.lexists(path):
        raise BadRequest(
            f"socket {path}: the service manager listens on it, but its file was removed, so that no client finds it; "
            "restart the socket unit (systemctl --user restart xditd.socket)"
        )
    # Clients ask the kernel who listens, and watch that process. It answers with whoever called listen(2) last
    # (unix_listen() in net/unix/af_unix.c), which was the manager so far.
    listener.listen(BACKLOG)
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener
