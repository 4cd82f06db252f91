"""The runtime folder: private, held by one daemon at a time, and free of what a dead one left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import AlreadyRunning, BadRequest, NotPermitted


class RuntimeFolder:
    """Hold a runtime folder from entry to exit of a ``with`` block.

    Raises:
        AlreadyRunning: another daemon holds it.
        BadRequest: the path is not a folder, cannot be made, or is too long for a socket.
        NotPermitted: somebody else owns it, or may enter it.
    """

    def __init__(self, runtime: RuntimeDir, *, keeps_client_socket: bool = False) -> None:
        """``keeps_client_socket``: a service manager listens on it, before us and after us."""
        runtime.check_lengths()
        self.runtime = runtime
        self._own_sockets = [runtime.worker_socket, *([] if keeps_client_socket else [runtime.client_socket])]
        # For everything that is made in the folder, by the workers too, which inherit it.
        os.umask(0o077)
        _make_private(runtime.path)
        self._lock_fd = _take_lock(runtime.lock)
        # Binding to a path that exists takes a live socket over without a word, so this waits for the lock.
        self._remove_sockets()
        self.remove_group_files()

    def __enter__(self) -> RuntimeFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the sockets, then let go of the lock; the lock file stays, since a successor may hold it already."""
        self._remove_sockets()
        self.remove_group_files()
        os.close(self._lock_fd)

    def remove_group_files(self) -> None:
        """Remove the files through which the ranks of a dead group met."""
        for path in self.runtime.path.glob("group-*"):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()

    def _remove_sockets(self) -> None:
        for socket in self._own_sockets:
            socket.unlink(missing_ok=True)


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise BadRequest(f"runtime folder {path}: exists and is not a folder; remove it or choose another") from None
    except OSError as error:
        raise BadRequest(
            f"runtime folder {path}: {error.strerror}; choose another (--runtime-dir or XDITD_RUNTIME_DIR)"
        ) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BadRequest(f"runtime folder {path}: a link, not a folder; name the folder itself")
    if found.st_uid != os.getuid():
        raise NotPermitted(f"runtime folder {path}: owned by uid {found.st_uid}, not {os.getuid()}; choose another")
    if found.st_mode & 0o077:
        raise NotPermitted(
            f"runtime folder {path}: mode {stat.S_IMODE(found.st_mode):04o} lets others in; chmod 700 {path}"
        )


def _take_lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadRequest(f"lock {path}: {error.strerror}; remove it or choose another runtime folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise AlreadyRunning(
            f"runtime folder {path.parent}: another daemon (pid {holder}) holds it; "
            "stop it (xditd stop) or choose another (--runtime-dir or XDITD_RUNTIME_DIR)"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
