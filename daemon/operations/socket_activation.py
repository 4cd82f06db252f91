"""Socket activation: take over the clients' socket, on which systemd has been listening.

Source: sd_listen_fds(3): ``LISTEN_PID`` is the receiving process, ``LISTEN_FDS`` the number of descriptors from 3 on.
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
    """Take over the listening socket of ``path``; ``None`` if none was passed to this process.

    The variables are removed from ``environ``, so that workers do not read them. The caller owns the socket, which is
    non-blocking and closed on exec.

    Raises:
        BadRequest: not exactly one listening Unix socket of this path was passed, or its file was removed.
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
    # Clients ask the kernel which process listens, and watch it. The answer is the last process that called listen(2)
    # (unix_listen() in net/unix/af_unix.c): until now, the service manager.
    listener.listen(BACKLOG)
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener
