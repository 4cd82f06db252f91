"""Addresses: the daemon's runtime folder, its sockets, and the address of its metrics."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xditd.ipc.errors import BadRequest

RUNTIME_DIR_VARIABLE = "XDITD_RUNTIME_DIR"
"""The runtime folder, for daemon, command line and library."""

MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` holds 108 bytes with its final NUL (unix(7))."""


@dataclass(frozen=True)
class RuntimeDir:
    """The daemon's private folder (mode 0700) and the names in it."""

    path: Path

    @property
    def client_socket(self) -> Path:
        return self.path / "daemon.sock"

    @property
    def worker_socket(self) -> Path:
        return self.path / "workers.sock"

    @property
    def metrics_socket(self) -> Path:
        """Where metrics are served with ``metrics = "unix"``."""
        return self.path / "metrics.sock"

    @property
    def lock(self) -> Path:
        return self.path / "daemon.lock"

    @property
    def log(self) -> Path:
        """The log of a daemon that ``xditd demo`` started."""
        return self.path / "daemon.log"

    def check_socket_paths(self) -> None:
        """Raise ``BadRequest`` if a socket path is longer than an address allows (107 bytes), or not UTF-8.

        ZeroMQ's endpoints and messages are text in UTF-8.
        """
        for socket in (self.client_socket, self.worker_socket):
            encoded = os.fsencode(socket)
            length = len(encoded)
            try:
                encoded.decode()
            except UnicodeDecodeError as error:
                raise BadRequest(
                    f"socket path {encoded!r}: it is not UTF-8; "
                    "choose another runtime folder (--runtime-dir or XDITD_RUNTIME_DIR)"
                ) from error
            if length > MAX_SOCKET_PATH_BYTES:
                raise BadRequest(
                    f"socket path {socket}: {length} bytes, at most {MAX_SOCKET_PATH_BYTES} fit; "
                    "choose a shorter runtime folder (--runtime-dir or XDITD_RUNTIME_DIR)"
                )


def expand_home(path: str) -> str:
    """Expand ``~`` and ``~user`` in a path that a user wrote."""
    return os.path.expanduser(path)


def user_path(path: str | os.PathLike[str]) -> Path:
    """Expand ``~`` and return a :class:`~pathlib.Path`. Use this or ``expand_home`` for every path of a user."""
    return Path(expand_home(os.fspath(path)))


MISSING: Final = "no such file or folder; name one of this machine, nothing is downloaded"
"""What is wrong with a path that is not there; the path goes before it."""


def check_is_there(path: str | os.PathLike[str], name: str = "") -> None:
    """Check that there is a file or a folder of this path. Other faults are for the one who opens it.

    Raises:
        BadRequest: there is none, or it is a text that no file can be named; ``name`` is that of the argument or flag.
    """
    before = f"{name}: " if name else ""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise BadRequest(f"{before}{os.fspath(path) or repr('')}: {MISSING}") from None
    except ValueError as error:
        what = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else "a null byte"
        raise BadRequest(f"{before}path {os.fspath(path)!r:.200}: {what} is in no file's name") from None


def endpoint(socket: Path) -> str:
    """Return ZeroMQ's endpoint of a socket path."""
    return f"ipc://{socket}"


def runtime_dir_at(folder: str | os.PathLike[str]) -> RuntimeDir:
    """Return the runtime folder that a program names.

    Raises:
        BadRequest: it is no path.
    """
    try:
        path = user_path(folder).absolute()
        is_path = b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        is_path = False
    if not is_path:
        raise BadRequest(
            f"runtime_dir: {folder!r:.100} of type {type(folder).__name__} is no folder's path; give a text or a Path, "
            "or leave it out"
        )
    return RuntimeDir(path)


def default_runtime_dir() -> RuntimeDir:
    """Return ``$XDITD_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/xditd``, else ``/tmp/xditd-<uid>``.

    The daemon creates the folder with mode 0700 and refuses one that another user owns.
    """
    named = os.environ.get(RUNTIME_DIR_VARIABLE)
    if named:
        return RuntimeDir(Path(named).absolute())
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return RuntimeDir(Path(base) / "xditd")
    return RuntimeDir(Path("/tmp") / f"xditd-{os.getuid()}")  # noqa: S108 - owner and mode are checked by the daemon


METRICS_OFF: Final = "off"
METRICS_UNIX: Final = "unix"


def parse_metrics_address(text: str) -> str | tuple[str, int]:
    """Parse ``off``, ``unix``, or a loopback address with a port (``127.0.0.1:9464``, ``[::1]:9464``).

    Raises:
        ValueError: anything else, also an address that other machines could reach.
    """
    if text in (METRICS_OFF, METRICS_UNIX):
        return text
    import ipaddress  # slow to import, and most daemons serve none

    host, _, port = text.rpartition(":")
    is_loopback = ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    if not is_loopback or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(text)
    return host.removeprefix("[").removesuffix("]"), int(port)
