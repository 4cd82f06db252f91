"""The runtime folder: private, locked by one daemon, and restored when another program has removed files.

Cleanup programs remove files from ``/tmp`` and ``/run/user`` while they are in use. Files are recognized by their
inode, so :meth:`RuntimeFolder.restore` finds what is missing, and no file of another process is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.socket_files import listen_at, remove_stale, storage_error
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import AlreadyRunning, BadRequest, NotPermitted, XditdError

logger = logging.getLogger(__name__)

PRIVATE: Final = 0o700
CHECK_EVERY_S: Final = 1.0
MAX_FAILURES: Final = 3
"""Failed restores in a row after which the daemon ends: another process may be removing the folder just now."""

Serve = Callable[[socket.socket], None]
"""Takes over a listening socket, in addition to earlier ones: existing connections stay."""


class HeldFile:
    """The file, folder or socket that is at ``path`` now, recognized later by its inode.

    An open descriptor keeps the inode number from being reused. The object owns it, also a ``descriptor`` that is
    given.

    Raises:
        OSError: nothing is there, or no descriptor is free.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags) if descriptor is None else descriptor

    def is_in_place(self) -> bool:
        """Return whether the same file is still at the path."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except OSError:
            return False

    def stat(self) -> os.stat_result:
        return os.fstat(self._fd)

    def chmod(self, mode: int) -> None:
        """Set the mode, by way of /proc: the descriptor is open for its path alone."""
        os.chmod(f"/proc/self/fd/{self._fd}", mode)

    def remove(self) -> None:
        """Remove the file if it is still the one at the path, not another process's."""
        if self.is_in_place():
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)


class RuntimeFolder:
    """Create and lock a runtime folder, until the exit of a ``with`` block.

    Raises:
        AlreadyRunning: another daemon has locked it.
        BadRequest: the path is not a folder, or is too long for a socket.
        NotPermitted: another user owns it, or may enter it.
        StorageError: it cannot be created or written.
    """

    def __init__(self, runtime: RuntimeDir) -> None:
        runtime.check_socket_paths()
        self.runtime = runtime
        self._sockets: dict[Path, tuple[HeldFile, Serve]] = {}
        self._awaited: HeldFile | None = None
        # For every file in the folder, also those of the workers, which inherit it.
        os.umask(0o077)
        _make_private(runtime.path)
        try:
            self._folder = HeldFile(runtime.path)
        except OSError as error:
            raise storage_error(f"runtime folder {runtime.path}", error) from error
        try:
            self._lock = _take_lock(runtime.lock)
        except BaseException:
            self._folder.close()
            raise
        try:
            # A free lock does not prove that no daemon runs: its lock file may have been removed. The workers' socket
            # proves it; the clients' may be a service manager's.
            remove_stale(runtime.worker_socket)
        except BaseException:
            self._close_files()
            raise

    def __enter__(self) -> RuntimeFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the sockets, then release the lock. The lock file stays: the next daemon may hold it already."""
        for held, _ in self._sockets.values():
            try:
                held.remove()
            except OSError as error:  # the folder is read-only by now, or closed to this process
                logger.warning("socket %s stays: %s; the next daemon removes it", held.path, error.strerror)
            held.close()
        self._close_files()

    def listen(self, path: Path, serve: Serve) -> None:
        """Listen at ``path`` while the folder is held: ``serve`` receives the socket, and another after each restore.

        Raises:
            AlreadyRunning: a process listens there.
            BadRequest: another kind of file is there.
            StorageError: the socket cannot be created.
        """
        listener = listen_at(path)
        try:
            held = HeldFile(path)
        except OSError as error:
            listener.close()
            raise storage_error(f"socket {path}", error) from error
        before = self._sockets.get(path)
        self._sockets[path] = (held, serve)
        if before is not None:
            before[0].close()
        serve(listener)

    def await_clients_at(self, path: Path) -> None:
        """Watch the socket at ``path``, which a service manager made: the daemon neither creates nor removes it."""
        self._awaited = HeldFile(path)

    def restore(self) -> list[Path]:
        """Create what is missing of folder, lock and sockets, and make the folder private; returns what was changed.

        Raises:
            AlreadyRunning: another daemon has locked the folder.
            BadRequest: another kind of file is in its place, or the service manager's socket is missing.
            NotPermitted: another user owns the folder, or may enter it.
            StorageError: it cannot be created.
        """
        try:
            return self._restore()
        except OSError as error:
            raise storage_error(f"runtime folder {self.runtime.path}", error) from error

    def _restore(self) -> list[Path]:
        made: list[Path] = []
        if self._awaited is not None and not self._awaited.is_in_place():
            raise BadRequest(
                f"socket {self._awaited.path}: it was removed, so no client can connect; the service manager made it: "
                "restart the socket unit (systemctl --user restart xditd.socket)"
            )
        if self._folder.is_in_place():
            made += self._keep_private()
        else:
            _make_private(self.runtime.path)
            folder = HeldFile(self.runtime.path)
            self._folder.close()
            self._folder = folder
            made.append(self.runtime.path)
        if not self._lock.is_in_place():
            lock = _take_lock(self.runtime.lock)
            self._lock.close()
            self._lock = lock
            made.append(self.runtime.lock)
        for path, (held, serve) in list(self._sockets.items()):
            if not held.is_in_place():
                self.listen(path, serve)
                made.append(path)
        return made

    def _keep_private(self) -> list[Path]:
        """Set the folder's mode again; return its path if that was needed."""
        path, found = self.runtime.path, self._folder.stat()
        _check_owner(path, found)
        mode = found.st_mode & 0o777
        if mode == PRIVATE:
            return []
        self._folder.chmod(PRIVATE)
        logger.warning("runtime folder %s: its mode was changed to %04o; it is %04o again", path, mode, PRIVATE)
        return [path]

    def _close_files(self) -> None:
        for held in (self._folder, self._lock, self._awaited):
            if held is not None:
                held.close()


class FolderWatch:
    """Restore ``folder`` every :data:`CHECK_EVERY_S`; ``give_up`` is called once, with the error, if that fails."""

    def __init__(self, loop: EventLoop, folder: RuntimeFolder, give_up: Callable[[XditdError], None]) -> None:
        self._loop = loop
        self._folder = folder
        self._give_up = give_up
        self._failures = 0

    def begin(self) -> None:
        self._loop.call_later(CHECK_EVERY_S, self.check)

    def check(self) -> None:
        try:
            made = self._folder.restore()
        except XditdError as error:
            self._failures += 1
            if self._failures == MAX_FAILURES:
                self._give_up(error)
                return
            logger.warning("runtime folder was damaged and is not restored yet: %s", error.detail)
        else:
            self._failures = 0
            if made:
                names = ", ".join(path.name for path in made)
                logger.warning("runtime folder was damaged by another program; restored: %s", names)
        self.begin()


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    except FileExistsError:
        raise BadRequest(f"runtime folder {path}: exists and is not a folder; remove it or choose another") from None
    except OSError as error:
        raise storage_error(f"runtime folder {path}", error) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BadRequest(f"runtime folder {path}: a link, not a folder; name the folder itself")
    _check_owner(path, found)
    if found.st_mode & 0o077:
        raise NotPermitted(
            f"runtime folder {path}: mode {stat.S_IMODE(found.st_mode):04o} lets others in; chmod 700 {path}"
        )


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid():
        raise NotPermitted(f"runtime folder {path}: owned by uid {found.st_uid}, not {os.getuid()}; choose another")


def _take_lock(path: Path) -> HeldFile:
    """Create the file at ``path`` if needed, and lock it until the returned object is closed."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(f"lock {path}", error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock = HeldFile(path, descriptor)
            if not lock.is_in_place():
                lock.close()  # the file was removed in between, so this lock excludes nobody
                continue
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise AlreadyRunning(
                f"runtime folder {path.parent}: another daemon (pid {holder}) holds it; "
                "stop it (xditd stop) or choose another (--runtime-dir or XDITD_RUNTIME_DIR)"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise storage_error(f"lock {path}", error) from error
        return lock
