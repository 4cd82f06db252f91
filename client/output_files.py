"""Write output files atomically, and check beforehand that they can be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest, OutputFailed

_NUMBERED: Final = re.compile(r"^(\d{5,9})(?:\.|$)")
_ALLOCATION_UNKNOWN: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Errors of ``posix_fallocate`` where the file system does not support it."""


def output_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a caller gave for output, with ``~`` expanded.

    Raises:
        BadRequest: it is empty, or no path at all.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(text, str):
        raise BadRequest(
            f"path: {path!r:.100} is of type {type(path).__name__}; name the output file by a text or a pathlib.Path"
        )
    if not text:
        raise BadRequest("path: '' names no file; name the output file, such as 'out.png'")
    return user_path(text)


def names_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a path means a folder of pictures: it ends with a slash, or has no suffix and is a folder."""
    text = os.fspath(path)
    # os.path.isdir: a name may be too long, which checks of the path say.
    return text.endswith(os.sep) or (text != "" and not Path(text).suffix and os.path.isdir(user_path(text)))


def numbered_paths(folder: str | os.PathLike[str], count: int, suffix: str) -> list[Path]:
    """Return paths in a folder, ``00000.png`` and so on, from the number after the largest one there."""
    where = user_path(folder)
    try:
        names = os.listdir(where)
    except OSError:  # it is not there, or cannot be read: checks of the path say so
        names = []
    first = max((int(found[1]) + 1 for found in map(_NUMBERED.match, names) if found), default=0)
    return [where / f"{first + number:05}{suffix}" for number in range(count)]


def take_numbered(folder: str | os.PathLike[str], count: int, suffix: str) -> list[Path]:
    """Return paths as :func:`numbered_paths` does, made as empty files, or as folders without a suffix.

    So no other thread or process takes their numbers meanwhile; :func:`drop_empty` removes those that stay empty.

    Raises:
        OutputFailed: the folder cannot be created or written.
    """
    found: list[Path] = []
    try:
        user_path(folder).mkdir(parents=True, exist_ok=True)
        while len(found) < count:
            (path,) = numbered_paths(folder, 1, suffix)
            with contextlib.suppress(FileExistsError):  # another one was faster
                path.touch(exist_ok=False) if suffix else path.mkdir()
                found.append(path)
    except (OSError, ValueError) as error:
        drop_empty(found)
        raise _output_failed(f"output folder {folder}", error) from error
    return found


def drop_empty(paths: Iterable[Path]) -> None:
    """Remove files and folders without content, such as those of :func:`take_numbered` that were not written."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            elif path.stat().st_size == 0:
                path.unlink()


def check_target(path: str | os.PathLike[str], size_bytes: int = 1) -> Path:
    """Check that a file of ``size_bytes`` can be written at a path. Creates no folder and leaves no file.

    Returns the path with ``~`` expanded, for :func:`write_file`.

    Raises:
        BadRequest: the path names a folder, a device or something else that is not a regular file.
        OutputFailed: the folder cannot be written or created, or the disk has no room.
    """
    target = output_path(path)
    try:
        real = Path(os.path.realpath(target))
        if real.is_dir():
            raise BadRequest(f"output file {target}: is a folder; name a file in it")
        _check_regular_file(target, real)
        real.exists()  # raises if the name is too long, or a folder of the path may not be searched
        folder = next(each for each in real.parents if os.path.lexists(each))
        try_writing(folder, size_bytes)
    except (OSError, ValueError) as error:
        raise _output_failed(f"output file {target}", error) from error
    return target


def check_folder_target(path: str | os.PathLike[str], size_bytes: int = 1) -> Path:
    """Check that a folder can be made at a path, with files of ``size_bytes`` in total. Leaves no file or folder.

    Returns the path with ``~`` expanded.

    Raises:
        BadRequest: there is something else at the path.
        OutputFailed: the folder cannot be written or created, or the disk has no room.
    """
    target = output_path(path)
    try:
        real = Path(os.path.realpath(target))
        if real.exists() and not real.is_dir():
            raise BadRequest(f"output folder {target}: is a file; name a folder, or one that is not there yet")
        folder = next(each for each in (real, *real.parents) if os.path.lexists(each))
        try_writing(folder, size_bytes)
    except (OSError, ValueError) as error:
        raise _output_failed(f"output folder {target}", error) from error
    return target


def check_folder(path: str | os.PathLike[str], size_bytes: int = 1) -> Path:
    """Create a folder, and check that files of ``size_bytes`` in total can be written into it.

    Raises:
        OutputFailed: the folder cannot be created or written, or the disk has no room.
    """
    folder = output_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder, size_bytes)
    except (OSError, ValueError) as error:
        raise _output_failed(f"output folder {folder}", error) from error
    return folder


def try_writing(folder: Path, size_bytes: int = 1) -> None:
    """Create a file of this size in a folder and remove it: the only sure test of permissions, quotas and mounts.

    Raises:
        OSError: the file cannot be created.
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
    """Write a file atomically: a reader sees the old content or all of the new one. Creates its folder.

    If the path is a link, the file that it names is replaced. Without ``mode`` an existing file keeps its mode.
    Returns the path with ``~`` expanded.

    Raises:
        OutputFailed: the path cannot be written, or the disk has no room; an existing file is unchanged.
    """
    target = output_path(path)
    try:
        real = Path(os.path.realpath(target))
        _check_regular_file(target, real)
        with contextlib.suppress(FileExistsError):  # if it is not a folder, open() raises a clearer error
            real.parent.mkdir(parents=True, exist_ok=True)
        if mode is None and real.exists():
            mode = real.stat().st_mode & 0o777
        new = real.parent / _temporary_name()
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(fd, "wb") as file:
                if mode is not None:
                    os.fchmod(fd, mode)
                _write_all(file.fileno(), parts)
            new.replace(real)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise _output_failed(f"output file {target}", error) from error
    return target


def write_or_keep(path: str | os.PathLike[str], what: str, *parts: bytes) -> Path:
    """Write a file as :func:`write_file` does; if that fails, write it to another folder.

    Raises:
        OutputFailed: the file was not written. ``kept`` names the file that has the content instead: in the first of
            $TMPDIR, /tmp, the home folder, /var/tmp and the current folder that has room.
    """
    try:
        return write_file(path, *parts)
    except OutputFailed as error:
        kept = _write_elsewhere(Path(path).suffix, parts)
        if kept is None:
            raise OutputFailed(f"{error.detail}; no other folder has room either; the {what} is lost") from error
        found = OutputFailed(f"{error.detail}; the {what} was saved as {kept}")
        found.kept = (str(kept),)
        raise found from error


def spare_folders() -> Iterator[Path]:
    """Yield the folders for content that could not be written to its place; in shared ones, make names exclusively."""
    for folder in (os.environ.get("TMPDIR"), "/tmp", "~", "/var/tmp", "."):  # noqa: S108
        if folder:
            yield user_path(folder).absolute()


def _write_elsewhere(suffix: str, parts: tuple[bytes, ...]) -> Path | None:
    for folder in spare_folders():
        try:
            # mkstemp: only the owner may read it, because temporary folders are shared.
            fd, name = tempfile.mkstemp(suffix=suffix, prefix="xditd-", dir=folder)
        except OSError:
            continue
        try:
            with open(fd, "wb") as file:
                _write_all(file.fileno(), parts)
        except OSError:
            os.unlink(name)
            continue
        return Path(name)
    return None


def _write_all(fd: int, parts: tuple[bytes, ...]) -> None:
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]
    os.fsync(fd)  # network and copy-on-write file systems may report a full disk only here


def _check_regular_file(target: Path, real: Path) -> None:
    """Refuse a device or a FIFO, which a rename would replace by a regular file."""
    if real.exists() and not real.is_file() and not real.is_dir():
        raise BadRequest(f"output file {target}: is no regular file; name one, or a file that is not there yet")


def _temporary_name() -> str:
    # Not the target's name with a suffix, which could be longer than a file name may be.
    return f".xditd-{os.urandom(8).hex()}.part"


def _output_failed(what: str, error: OSError | ValueError) -> OutputFailed:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return OutputFailed(f"{what}: {why}; choose another place")
