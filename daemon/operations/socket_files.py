"""Create and remove Unix sockets of the runtime folder, without removing files of other processes.

ZeroMQ would unlink any file at the path when it binds and when it closes (libzmq 4.3.5, ``ipc_listener.cpp``); with a
descriptor that listens already it does not.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from xditd.ipc.errors import AlreadyRunning, BadRequest, StorageError
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors
from xditd.ipc.processes import peer_credentials

BACKLOG: Final = 128


def listen_at(path: Path) -> socket.socket:
    """Return a non-blocking socket that listens at ``path`` (mode 0600) and is closed on exec.

    Raises:
        AlreadyRunning: a process listens there.
        BadRequest: another kind of file is there.
        StorageError: the socket cannot be created.
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
    """Remove the socket that an earlier daemon left at ``path``, if any.

    Raises:
        AlreadyRunning: a process listens on it.
        BadRequest: it is not a socket.
        StorageError: it cannot be removed.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadRequest(f"socket {path}: another kind of file is there; remove it or choose another folder")
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
    """Return the pid of the process that listens at ``path``, 0 if it is not visible; ``None`` if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # the backlog is full, so a process listens
            return 0
        except OSError:
            return None
        pid, _ = peer_credentials(probe)
    return pid


def storage_error(what: str, error: OSError) -> StorageError:
    """Build the error for ``what`` that cannot be created in the runtime folder, with its remedy."""
    if is_want_of_descriptors(error):
        return StorageError(f"{what}: {describe_limit()}")
    elsewhere = "choose another runtime folder (--runtime-dir or XDITD_RUNTIME_DIR)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{what}: {error.strerror}; free disk space or inodes (see df, df -i), or {elsewhere}")
    return StorageError(f"{what}: {error.strerror}; {elsewhere}")
