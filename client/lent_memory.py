"""The memory of a component that is lent: its blocks, and what keeps them alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xditd.client.arenas import Arena
from xditd.ipc.tensors import Block, CopiedBytes
from xditd.ipc.transports.file import LentFile


class LentMemory:
    """The blocks of a manifest, and the storages, arenas and files that keep their memory alive."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.copied = CopiedBytes()
        self.notes: list[str] = []
        self.keeps_order = False
        """Whether copies have the order of dimensions in memory of the tensors: some kernels round by it."""
        self._keys: dict[tuple[Any, ...], int] = {}
        self._storages: list[object] = []
        self._arenas: list[Arena] = []
        self._files: dict[str, LentFile] = {}

    def block_number(self, key: tuple[Any, ...], make: Callable[[], Block]) -> int:
        """Return the number of the block with this key, and make the block at the first use."""
        if key not in self._keys:
            self.blocks.append(make())
            self._keys[key] = len(self.blocks) - 1
        return self._keys[key]

    def keep(self, storage: object) -> None:
        self._storages.append(storage)

    def own_arena(self, arena: Arena) -> Arena:
        self._arenas.append(arena)
        self.copied = self.copied + arena.copied
        return arena

    def open_file(self, path: str) -> LentFile:
        if path not in self._files:
            self._files[path] = LentFile(path)
        return self._files[path]

    def close(self) -> None:
        self._storages.clear()
        while self._files:
            self._files.popitem()[1].close()
        while self._arenas:
            self._arenas.pop().close()
