"""Unix sockets at paths of the runtime folder: bound here, so that nobody removes a file that is not ours.

ZeroMQ would unlink whatever lies at the path before it binds, and again when it closes (libzmq 4.3.5,
``ipc_listener.cpp``). A descriptor that listens already is left alone by it.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from xditd.ipc.errors import AlreadyRunning, BadRequest, StorageError
from xditd.ipc.processes import peer_credentials

BACKLOG: Final = 128


def listen_at(path: Path) -> socket.socket:
    """Return a socket that listens at ``path`` (mode 0600), does not block and is closed on exec.

    Raises:
        AlreadyRunning: a process listens there.
        BadRequest: something else lies there.
        StorageError: nothing can be made there; the message says what helps.
    """
    remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind(2) gives the file this mode, less the umask
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise storage_error(f"socket {path}", error) from error
    return listener


def remove_stale(path: Path) -> None:
    """Remove the socket that a dead daemon left at ``path``.

    Raises:
        AlreadyRunning: a process listens on it.
        BadRequest: it is not a socket.
        StorageError: it cannot be removed.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadRequest(f"socket {path}: another kind of file lies there; remove it or choose another folder")
        pid = who_listens(path)
        if pid is not None:
            raise AlreadyRunning(
                f"socket {path}: another daemon (pid {pid}) listens there; "
                "stop it (xditd stop) or choose another folder (--runtime-dir or XDITD_RUNTIME_DIR)"
            )
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(f"socket {path}", error) from error


def who_listens(path: Path) -> int | None:
    """Return the pid of the process that listens at ``path``, 0 where it is not visible; ``None`` if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # so many wait that there is no room for one more: somebody listens
            return 0
        except OSError:
            return None
        pid, _ = peer_credentials(probe)
    return pid


def storage_error(what: str, error: OSError) -> StorageError:
    """Say that ``what`` cannot be made in the runtime folder, and what helps."""
    elsewhere = "choose another runtime folder (--runtime-dir or XDITD_RUNTIME_DIR)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{what}: {error.strerror}; make room there (df and df -i show it), or {elsewhere}")
    return StorageError(f"{what}: {error.strerror}; {elsewhere}")
