"""Rank 0's watch over the lent files that CPU ranks compute with: are they still what was lent?

All ranks map the same files, so one looks for all, and ``raise_on_all_ranks`` tells the others. On a GPU there is
nothing to watch: what came from files was copied, and checked around the copy, when it was lent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.errors import StaleSource
from xditd.ipc.tensors import FileBlock, FileDigest, Manifest
from xditd.ipc.transports.file import FileMapping

Opened = Sequence[OpenBlock | None]
"""The blocks of a component, in the manifest's order; ``None`` is one that another rank has mapped."""


class _Unreported(NamedTuple):
    manifest: Manifest
    opened: Opened
    numbers: set[int]
    """Of the files whose digests the daemon does not know yet."""


class FileWatch:
    """Digests files while others work, checks them, and has the digests told to the daemon for a later group."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._is_on = layout.rank == 0 and layout.device.type != "cuda"
        self._unreported: dict[str, _Unreported] = {}

    @property
    def has_unreported(self) -> bool:
        """Whether :meth:`take_digests` will have something to return."""
        return bool(self._unreported)

    def begin(self, opened: Opened) -> None:
        """Begin to digest what was mapped; it goes on while others work."""
        if self._is_on:
            for file in _files_of(opened).values():
                file.begin_digest()

    def await_small(self, opened: Opened) -> None:
        """Wait for the digests of small files: they may be renamed as soon as the lend has returned."""
        if self._is_on:
            for file in _files_of(opened).values():
                file.await_small_digest()

    def check(self, opened: Opened) -> None:
        """Check that files are what was lent, on rank 0 of ranks on the CPU.

        Raises:
            StaleSource: one was rewritten, truncated or grown.
        """
        if self._is_on:
            check_opened(opened)

    def note_plugged(self, component_id: str, manifest: Manifest, opened: Opened) -> None:
        """Note that the daemon is to be told the digests of a component's files."""
        numbers = set(_files_of(opened))
        if self._is_on and numbers:
            self._unreported[component_id] = _Unreported(manifest, opened, numbers)

    def forget(self, component_id: str) -> None:
        """Note that a component's blocks are about to be released."""
        self._unreported.pop(component_id, None)

    def take_digests(self) -> dict[str, tuple[FileDigest, ...]]:
        """Return what has become known since the last call, by component."""
        taken: dict[str, tuple[FileDigest, ...]] = {}
        for component_id, (manifest, opened, numbers) in list(self._unreported.items()):
            files = _files_of(opened)
            over = {number for number in numbers if not files[number].is_digesting}
            if not over:
                continue
            numbers -= over
            if not numbers:
                del self._unreported[component_id]
            found = []
            for number, file in files.items():
                block = manifest.blocks[number]
                if isinstance(block, FileBlock) and file.digest is not None:
                    found.append(FileDigest(block=number, ctime_ns=block.ctime_ns, digest=file.digest))
            if found:
                taken[component_id] = tuple(found)
        return taken


def check_opened(opened: Opened) -> None:
    """Check that every file among these blocks is what was lent.

    Raises:
        StaleSource: one is not.
    """
    for block in opened:
        if block is not None:
            block.check_unchanged()


def _files_of(opened: Opened) -> dict[int, FileMapping]:
    return {
        number: block.mapping
        for number, block in enumerate(opened)
        if block is not None and isinstance(block.mapping, FileMapping)
    }


def fault_of(opened: Opened) -> StaleSource | None:
    """What is wrong with a component's files, if anything is.

    A file that has changed under one rank's share has changed for all, also for those whose share was read before: each
    says so itself, and not that another rank does.
    """
    try:
        check_opened(opened)
    except StaleSource as error:
        return error
    return None
