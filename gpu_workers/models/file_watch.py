"""Detect changes of lent files that CPU ranks have mapped.

All ranks map the same files, so rank 0 checks for all, and ``raise_on_all_ranks`` passes its error on. GPU ranks copy a
file, and check it before and after, when it is lent: nothing is left to check later.
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
"""The blocks of a component, in the manifest's order; ``None``: another rank has mapped it."""


class _Unreported(NamedTuple):
    manifest: Manifest
    opened: Opened
    numbers: set[int]
    """Numbers of the file blocks whose digests the daemon does not have yet."""


class FileWatch:
    """Hashes files in the background, checks them, and collects the digests for the daemon."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._is_on = layout.rank == 0 and layout.device.type != "cuda"
        self._unreported: dict[str, _Unreported] = {}

    @property
    def has_unreported(self) -> bool:
        """Whether :meth:`take_digests` will return more."""
        return bool(self._unreported)

    def begin_digests(self, opened: Opened) -> None:
        """Begin to hash the mapped files in the background."""
        if self._is_on:
            for file in _file_mappings(opened).values():
                file.begin_digest()

    def wait_for_small_digests(self, opened: Opened) -> None:
        """Wait for the digests of small files: clients may rename them as soon as the lend has returned."""
        if self._is_on:
            for file in _file_mappings(opened).values():
                file.await_small_digest()

    def check(self, opened: Opened) -> None:
        """Check that the files are unchanged, on rank 0 of CPU ranks.

        Raises:
            StaleSource: one was rewritten, truncated or grown.
        """
        if self._is_on:
            check_files_unchanged(opened)

    def add_plugged(self, component_id: str, manifest: Manifest, opened: Opened) -> None:
        """Report the digests of this component's files with the next :meth:`take_digests`."""
        numbers = set(_file_mappings(opened))
        if self._is_on and numbers:
            self._unreported[component_id] = _Unreported(manifest, opened, numbers)

    def forget(self, component_id: str) -> None:
        """Remove a component, before its blocks are released."""
        self._unreported.pop(component_id, None)

    def take_digests(self) -> dict[str, tuple[FileDigest, ...]]:
        """Return the digests that were finished since the last call, by component id."""
        taken: dict[str, tuple[FileDigest, ...]] = {}
        for component_id, (manifest, opened, numbers) in list(self._unreported.items()):
            files = _file_mappings(opened)
            finished = {number for number in numbers if not files[number].is_digesting}
            if not finished:
                continue
            numbers -= finished
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


def check_files_unchanged(opened: Opened) -> None:
    """Raise ``StaleSource`` if a file among these blocks has changed since it was lent."""
    for block in opened:
        if block is not None:
            block.check_unchanged()


def _file_mappings(opened: Opened) -> dict[int, FileMapping]:
    return {
        number: block.mapping
        for number, block in enumerate(opened)
        if block is not None and isinstance(block.mapping, FileMapping)
    }


def stale_file_error(opened: Opened) -> StaleSource | None:
    """Return the error if a file among these blocks has changed, also after this rank has read its share.

    So each rank names the file, instead of raising that another rank failed.
    """
    try:
        check_files_unchanged(opened)
    except StaleSource as error:
        return error
    return None
