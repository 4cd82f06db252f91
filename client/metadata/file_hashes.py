"""Hashes of files for records: of pieces of a large file, which takes milliseconds, and of all of a small one.

A fine-tune has the header and the size of its base model, and differs in nearly every tensor: pieces tell them apart
without reading 24 GB.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import Final

from xditd.client.metadata.record import FileRecord
from xditd.ipc.transports.file_state import FileState, settled_stat

PIECES: Final = 64
PIECE_BYTES: Final = 4_096
WHOLE_BYTES: Final = 256 * 2**20
"""Files up to this size are hashed as a whole, too: LoRAs and small VAEs, by the hash that hubs show."""

_CHUNK_BYTES: Final = 2**22
_MAX_KNOWN: Final = 1_024
_known: dict[FileState, FileRecord] = {}
_lock = threading.Lock()


def describe(path: str | os.PathLike[str], *, read_ns: int | None = None) -> FileRecord:
    """Describe a file. One that cannot be read, or is no file, has its name alone. For any thread.

    So has one that has changed since ``read_ns``, when its content was used (as :func:`time.time_ns` counts), or that
    is written while it is hashed.
    What is found is kept for this process, by device, inode, size, mtime and ctime.
    """
    name = base_name(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
            found = settled_stat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return FileRecord(name=name)
            if read_ns is not None and max(found.st_mtime_ns, found.st_ctime_ns) > read_ns:
                return FileRecord(name=name)
            state = FileState.of_stat(found)
            with _lock:
                known = _known.get(state)
            if known is None:
                known = FileRecord(
                    name=name,
                    bytes=found.st_size,
                    sample=_sample(file.fileno(), found.st_size),
                    sha256=_whole(file.fileno()) if found.st_size <= WHOLE_BYTES else None,
                )
                if FileState.of_stat(os.fstat(file.fileno())) != state:
                    return FileRecord(name=name)
                with _lock:
                    if len(_known) >= _MAX_KNOWN:
                        _known.clear()
                    _known[state] = known
    except (OSError, ValueError):
        return FileRecord(name=name)
    return FileRecord(name=name, bytes=known.bytes, sample=known.sample, sha256=known.sha256)


def is_same(record: FileRecord, path: str | os.PathLike[str]) -> bool | None:
    """Return whether a file is the one of a record; ``None`` if the record has no hash of it."""
    if record.sample is None:
        return None
    found = describe(path)
    return (found.bytes, found.sample) == (record.bytes, record.sample)


def base_name(path: str | os.PathLike[str]) -> str:
    """Return the last part of a path, as a record may have it: no folders, and printable letters."""
    name = os.fsencode(Path(path).name).decode("utf-8", "replace")
    kept = "".join(letter if letter.isprintable() else "_" for letter in name)[:255]
    return kept if kept.strip(".") else "unnamed"


def _sample(fd: int, size: int) -> str:
    found = hashlib.sha256(size.to_bytes(8, "little"))
    if size <= PIECES * PIECE_BYTES:
        found.update(os.pread(fd, size, 0))
    else:
        for number in range(PIECES):
            found.update(os.pread(fd, PIECE_BYTES, number * (size - PIECE_BYTES) // (PIECES - 1)))
    return found.hexdigest()


def _whole(fd: int) -> str:
    found, offset = hashlib.sha256(), 0
    while chunk := os.pread(fd, _CHUNK_BYTES, offset):
        found.update(chunk)
        offset += len(chunk)
    return found.hexdigest()
