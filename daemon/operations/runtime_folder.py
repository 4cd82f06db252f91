"""The runtime folder: private, held by one daemon at a time, and made again when another program has removed it.

Programs that tidy up remove files from ``/tmp`` and ``/run/user`` while they are in use. What is held here is known by
its inode, so that :meth:`RuntimeFolder.restore` sees what is missing, and nothing that another process made is removed.
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

LOOK_EVERY_S: Final = 1.0
MOST_FAILURES: Final = 3
"""Looks in a row at which mending fails, until the daemon ends: another process may be removing the folder just now."""

Serve = Callable[[socket.socket], None]
"""Takes a listening socket over, beside those that it has: connections that exist stay."""


class HeldFile:
    """The file (or folder, or socket) that lies at ``path`` now, known again by its inode.

    A descriptor holds the inode, so that its number is not given to another file while this object lives. One of the
    file that is open already may be given, and belongs to this object then.

    Raises:
        OSError: nothing lies there, or no descriptor is free.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags) if descriptor is None else descriptor

    def is_in_place(self) -> bool:
        """Whether the same file is still at the path, and no other."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file, if it is still the one at the path: what another process put there is not ours."""
        if self.is_in_place():
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)


class RuntimeFolder:
    """Hold a runtime folder from entry to exit of a ``with`` block.

    Raises:
        AlreadyRunning: another daemon holds it.
        BadRequest: the path is not a folder, or is too long for a socket.
        NotPermitted: somebody else owns it, or may enter it.
        StorageError: it cannot be made or written.
    """

    def __init__(self, runtime: RuntimeDir) -> None:
        runtime.check_lengths()
        self.runtime = runtime
        self._sockets: dict[Path, tuple[HeldFile, Serve]] = {}
        self._awaited: HeldFile | None = None
        # For everything that is made in the folder, by the workers too, which inherit it.
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
            # Whoever removed the lock of a live daemon, for us to take, did not end that daemon. This socket is its own
            # in every case; the clients' may be a service manager's.
            remove_stale(runtime.worker_socket)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> RuntimeFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the sockets, then let go of the lock; the lock file stays, since a successor may hold it already."""
        for held, _ in self._sockets.values():
            held.remove()
            held.close()
        self._let_go()

    def listen(self, path: Path, serve: Serve) -> None:
        """Listen at ``path`` for as long as the folder is held: ``serve`` gets the listening socket.

        It gets another one whenever the file had to be made again.

        Raises:
            AlreadyRunning: a process listens there.
            BadRequest: something else lies there.
            StorageError: nothing can be made there.
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
        """Rely on the socket at ``path``, on which a service manager listens: it is not ours to make or to remove."""
        self._awaited = HeldFile(path)

    def restore(self) -> list[Path]:
        """Make again what is missing of folder, lock and sockets; returns their paths.

        Raises:
            AlreadyRunning: another daemon holds the folder by now.
            BadRequest: something else has taken its place, or it is not ours to make.
            NotPermitted: somebody else owns the folder by now, or may enter it.
            StorageError: it cannot be made.
        """
        try:
            return self._restore()
        except OSError as error:
            raise storage_error(f"runtime folder {self.runtime.path}", error) from error

    def _restore(self) -> list[Path]:
        made: list[Path] = []
        if self._awaited is not None and not self._awaited.is_in_place():
            raise BadRequest(
                f"socket {self._awaited.path}: it was removed, and with it the way of clients to this daemon; the "
                "service manager made it, and makes it again when the socket unit is restarted "
                "(systemctl --user restart xditd.socket)"
            )
        if not self._folder.is_in_place():
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

    def _let_go(self) -> None:
        for held in (self._folder, self._lock, self._awaited):
            if held is not None:
                held.close()


class FolderWatch:
    """Look at ``folder`` every :data:`LOOK_EVERY_S`; ``give_up`` is called once, with why it cannot be mended."""

    def __init__(self, loop: EventLoop, folder: RuntimeFolder, give_up: Callable[[XditdError], None]) -> None:
        self._loop = loop
        self._folder = folder
        self._give_up = give_up
        self._failures = 0

    def begin(self) -> None:
        self._loop.call_later(LOOK_EVERY_S, self.look)

    def look(self) -> None:
        try:
            made = self._folder.restore()
        except XditdError as error:
            self._failures += 1
            if self._failures == MOST_FAILURES:
                self._give_up(error)
                return
            logger.warning("runtime folder was harmed and is not mended yet: %s", error.detail)
        else:
            self._failures = 0
            if made:
                logger.warning(
                    "runtime folder was harmed by another program; made again: %s",
                    ", ".join(path.name for path in made),
                )
        self.begin()


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise BadRequest(f"runtime folder {path}: exists and is not a folder; remove it or choose another") from None
    except OSError as error:
        raise storage_error(f"runtime folder {path}", error) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BadRequest(f"runtime folder {path}: a link, not a folder; name the folder itself")
    if found.st_uid != os.getuid():
        raise NotPermitted(f"runtime folder {path}: owned by uid {found.st_uid}, not {os.getuid()}; choose another")
    if found.st_mode & 0o077:
        raise NotPermitted(
            f"runtime folder {path}: mode {stat.S_IMODE(found.st_mode):04o} lets others in; chmod 700 {path}"
        )


def _take_lock(path: Path) -> HeldFile:
    """Lock the file at ``path``, which is made if it is not there, until what is returned is closed."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(f"lock {path}", error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock = HeldFile(path, descriptor)
            if not lock.is_in_place():
                lock.close()  # it was removed in between, and a lock on it keeps nobody out
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
