"""The files of a host that its agent may lend, by content hash."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xditd.client.cluster.content_hashes import ContentHashes, FileKey, file_key
from xditd.ipc.errors import BadRequest, StaleSource, UnknownComponent

logger = logging.getLogger(__name__)

SUFFIXES: Final = (".safetensors", ".gguf")


class HostFiles:
    """Finds the checkpoint files below the folders of ``search_path``, and hashes each once.

    ``search_path`` holds folders, which are read with their subfolders, and files. Symbolic links to folders are not
    followed. One that does not exist, for now, has no files. For any thread: one scans at a time.
    """

    def __init__(self, search_path: Sequence[Path], hashes: ContentHashes) -> None:
        self._search_path = tuple(search_path)
        self._hashes = hashes
        self._scanning = threading.Lock()
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._keys: dict[Path, FileKey] = {}
        self._told: set[str] = set()

    def scan(self) -> None:
        """Look for new, changed and removed files. The first scan reads all bytes of files that no cache knows."""
        with self._scanning:
            paths: dict[str, Path] = {}
            keys: dict[Path, FileKey] = {}
            refused: set[str] = set()
            for path in self._candidates():
                try:
                    keys[path] = file_key(path)
                    digest = self._hashes.of(path)
                except (BadRequest, StaleSource) as error:
                    refused.add(error.detail)
                    if error.detail not in self._told:  # by the last scan
                        logger.warning("file is not offered: %s", error)
                    continue
                paths.setdefault(digest, path)
                with self._lock:  # so that a host offers its first files while it hashes the others
                    self._paths.setdefault(digest, path)
                    self._keys[path] = keys[path]
            with self._lock:
                self._paths, self._keys = paths, keys
            self._told = refused

    def digests(self) -> dict[str, int]:
        """Return the content hashes of the files known by now, with their sizes in bytes."""
        with self._lock:
            return {digest: self._keys[path][2] for digest, path in self._paths.items()}

    def find(self, digest: str) -> tuple[Path, FileKey]:
        """Return a file with this content, and the key by which :meth:`check` notices a change.

        Raises:
            UnknownComponent: no file below the search path has this content.
        """
        for again in (False, True):
            if again:
                self.scan()  # the file may be new, moved, or rewritten
            with self._lock:
                path = self._paths.get(digest)
                key = None if path is None else self._keys[path]
            if path is not None and key is not None and _is_unchanged(path, key):
                return path, key
        folders = ", ".join(map(str, self._search_path))
        raise UnknownComponent(f"content {digest}: no file below {folders} has it; copy the file there")

    @staticmethod
    def check(path: Path, key: FileKey) -> None:
        """Check that a file still has the content that was hashed.

        Raises:
            StaleSource: it was written to, or replaced.
        """
        if not _is_unchanged(path, key):
            raise StaleSource(f"{path}: changed since its content hash was computed; the next job hashes it again")

    def _candidates(self) -> list[Path]:
        found: list[Path] = []
        for start in self._search_path:
            if os.path.isfile(start):
                found.append(start)
            for folder, _, names in os.walk(start):
                found += [Path(folder, name) for name in sorted(names) if name.endswith(SUFFIXES)]
        return found


def _is_unchanged(path: Path, key: FileKey) -> bool:
    try:
        return file_key(path) == key
    except BadRequest:
        return False
