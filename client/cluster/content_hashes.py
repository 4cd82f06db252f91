"""Content hashes of files: the name that a file has on every host, whatever its path there."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Annotated, Final

import msgspec

from xditd.client.output_files import write_file
from xditd.ipc.errors import BadRequest, StaleSource, StorageError, XditdError

logger = logging.getLogger(__name__)

PREFIX: Final = "blake2b:"
_DIGEST_BYTES: Final = 32
_CHUNK_BYTES: Final = 1 << 22
_MAX_ENTRIES: Final = 20_000
"""Entries of the cache file; the oldest are dropped."""


FileKey = tuple[int, int, int, int, int]


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    digest: Annotated[str, msgspec.Meta(pattern=f"^{PREFIX}[0-9a-f]{{64}}$")]

    @property
    def key(self) -> FileKey:
        return self.device, self.inode, self.size_bytes, self.mtime_ns, self.ctime_ns


def cache_path() -> Path:
    """Return the file with the hashes that are known: below ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "xditd" / "content-hashes.json"


def check_content_id(text: str) -> str:
    """Return ``text`` if it is a content hash: ``blake2b:`` and 64 hexadecimal digits.

    Raises:
        BadRequest: it is something else.
    """
    digits = text.removeprefix(PREFIX)
    if not text.startswith(PREFIX) or len(digits) != 2 * _DIGEST_BYTES or set(digits) - set("0123456789abcdef"):
        raise BadRequest(
            f"{text!r:.200}: no content hash, which is {PREFIX} and {2 * _DIGEST_BYTES} hexadecimal digits; "
            "`xditd cluster hash FILE` prints that of a file"
        )
    return text


class ContentHashes:
    """BLAKE2b of all bytes of files, each computed once and kept in ``cache``, a file of this user's.

    A hash is known by the file's device, inode, size, mtime and ctime: who writes to a file changes its ctime, which no
    program can set. For any thread; a file is read without the lock.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache_path() if cache is None else cache
        self._lock = threading.Lock()
        self._known: dict[FileKey, str] = {}
        for entry in _read_cache(self._cache):
            self._known[entry.key] = entry.digest

    def of(self, path: Path) -> str:
        """Return the content hash of a file, reading it only if it is unknown: 1 GB takes about a second.

        Raises:
            BadRequest: no regular file, or not readable.
            StaleSource: the file changed while it was read.
        """
        key = file_key(path)
        with self._lock:
            known = self._known.get(key)
        if known is not None:
            return known
        digest = _hash(path, key)
        with self._lock:
            self._known[key] = digest
            self._write_cache()
        return digest

    def _write_cache(self) -> None:
        for entry in _read_cache(self._cache):  # what other processes have found since
            self._known.setdefault(entry.key, entry.digest)
        while len(self._known) > _MAX_ENTRIES:
            del self._known[next(iter(self._known))]
        entries = [_Entry(*key, digest) for key, digest in self._known.items()]
        try:
            self._cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self._cache, msgspec.json.encode(entries), mode=0o600)
        except (OSError, XditdError) as error:
            logger.warning("content hashes are not kept path=%s reason=%s", self._cache, error)


def file_key(path: Path) -> FileKey:
    """Return what identifies the content of a file: its device, inode, size, mtime and ctime.

    Raises:
        BadRequest: no regular file, or not readable.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    return _key(found, path)


def _key(found: os.stat_result, path: Path) -> FileKey:
    import stat

    if not stat.S_ISREG(found.st_mode):
        raise BadRequest(f"{path}: not a regular file; only files have a content hash")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(path: Path, key: FileKey) -> str:
    found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    try:
        # Non-blocking, so that a FIFO which took the file's name is not waited for.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
            changed = _key(os.fstat(file.fileno()), path) != key
            while not changed and (count := file.readinto(buffer)):
                found.update(view[:count])
            changed = changed or _key(os.fstat(file.fileno()), path) != key
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    if changed:
        raise StaleSource(f"{path}: changed while its content hash was computed; wait until it is complete")
    return PREFIX + found.hexdigest()


def _read_cache(path: Path) -> list[_Entry]:
    """Read the known hashes. Others could have written a cache that they may write to: it is not read then."""
    with contextlib.suppress(FileNotFoundError):
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_uid != os.getuid() or found.st_mode & 0o022:
                    raise StorageError("others than this user may write it")
                return msgspec.json.decode(file.read(), type=list[_Entry])
        except FileNotFoundError:
            raise
        except (OSError, msgspec.MsgspecError, StorageError) as error:
            logger.warning("cache of content hashes is not used path=%s reason=%s", path, error)
    return []
