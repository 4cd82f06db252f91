"""Files that this library writes: their place is looked at before the work, and each is written in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest, OutputFailed

_ALLOCATION_UNKNOWN: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""How a file system says that it cannot reserve room."""


def check_target(path: str | os.PathLike[str], size_bytes: int = 1) -> Path:
    """Look whether a file of ``size_bytes`` can be written at a path. Leaves nothing behind, and makes no folder.

    Returns the path with ``~`` replaced, for :func:`write_file`.

    Raises:
        BadRequest: it names a folder, a device or something else that is no file.
        OutputFailed: its folder may not be written, has no room, or cannot be made.
    """
    target = user_path(path)
    try:
        real = Path(os.path.realpath(target))
        if real.is_dir():
            raise BadRequest(f"output file {target}: is a folder; name a file in it")
        _refuse_other_kinds(target, real)
        real.exists()  # a name that is too long, or a folder on the way that may not be searched
        folder = next(each for each in real.parents if os.path.lexists(each))
        try_writing(folder, size_bytes)
    except (OSError, ValueError) as error:
        raise _failure(f"output file {target}", error) from error
    return target


def check_folder(path: str | os.PathLike[str], size_bytes: int = 1) -> Path:
    """Make a folder, and look whether files of ``size_bytes`` altogether can be written into it.

    Raises:
        OutputFailed: it cannot be made or written, or has no room.
    """
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder, size_bytes)
    except (OSError, ValueError) as error:
        raise _failure(f"output folder {folder}", error) from error
    return folder


def try_writing(folder: Path, size_bytes: int = 1) -> None:
    """Make a file of this size in a folder, and remove it: permissions, quotas and mounts have no better test.

    Raises:
        OSError: it cannot be made.
    """
    name = folder / _temporary_name()
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, max(1, size_bytes))
    except OSError as error:
        if error.errno not in _ALLOCATION_UNKNOWN:
            raise
    finally:
        os.close(fd)
        os.unlink(name)


def write_file(path: str | os.PathLike[str], *parts: bytes, mode: int | None = None) -> Path:
    """Write a file in one step: a reader sees the old content or all of the new one. Makes its folder.

    A link stays a link: the file that it names is replaced. Without ``mode`` an existing file keeps its own.
    Returns the path with ``~`` replaced.

    Raises:
        OutputFailed: the place may not be written or has no room; what was there before is unchanged.
    """
    target = user_path(path)
    try:
        real = Path(os.path.realpath(target))
        _refuse_other_kinds(target, real)
        with contextlib.suppress(FileExistsError):  # where that is no folder, opening says so better
            real.parent.mkdir(parents=True, exist_ok=True)
        if mode is None and real.exists():
            mode = real.stat().st_mode & 0o777
        new = real.parent / _temporary_name()
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(fd, "wb") as file:
                if mode is not None:
                    os.fchmod(fd, mode)
                _fill(file.fileno(), parts)
            new.replace(real)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise _failure(f"output file {target}", error) from error
    return target


def write_or_keep(path: str | os.PathLike[str], what: str, *parts: bytes) -> Path:
    """Write a file as :func:`write_file` does; where that fails, keep its content in another folder.

    Raises:
        OutputFailed: the file was not written. ``kept`` names the file that holds the content instead: in $TMPDIR,
            the home folder, /var/tmp or the current folder, whichever is the first that has room.
    """
    try:
        return write_file(path, *parts)
    except OutputFailed as error:
        kept = _keep(Path(path).suffix, parts)
        if kept is None:
            raise OutputFailed(f"{error.detail}; no other folder has room for the {what} either, it is lost") from error
        found = OutputFailed(f"{error.detail}; the {what} is kept as {kept}")
        found.kept = (str(kept),)
        raise found from error


def _keep(suffix: str, parts: tuple[bytes, ...]) -> Path | None:
    for folder in (os.environ.get("TMPDIR"), "/tmp", "~", "/var/tmp", "."):  # noqa: S108 - made exclusively, below
        if not folder:
            continue
        try:
            # For its owner's eyes alone: temporary folders are shared.
            fd, name = tempfile.mkstemp(suffix=suffix, prefix="xditd-", dir=user_path(folder).absolute())
        except OSError:
            continue
        try:
            with open(fd, "wb") as file:
                _fill(file.fileno(), parts)
        except OSError:
            os.unlink(name)
            continue
        return Path(name)
    return None


def _fill(fd: int, parts: tuple[bytes, ...]) -> None:
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]
    os.fsync(fd)  # network and copy-on-write file systems report a full disk no earlier


def _refuse_other_kinds(target: Path, real: Path) -> None:
    """A rename would replace a device or a FIFO by a file."""
    if real.exists() and not real.is_file() and not real.is_dir():
        raise BadRequest(f"output file {target}: is no regular file; name one, or a file that is not there yet")


def _temporary_name() -> str:
    # Of a length of its own: a target whose name is as long as names may be has no room for a suffix.
    return f".xditd-{os.urandom(8).hex()}.part"


def _failure(what: str, error: OSError | ValueError) -> OutputFailed:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return OutputFailed(f"{what}: {why}; choose another place")
