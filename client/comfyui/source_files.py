"""Notice that a checkpoint file was overwritten after a loader had read it.

ComfyUI keeps a loader's MODEL from prompt to prompt, and its tensors are pages of the file. Written over, they would
hold other weights than the MODEL was made of, without a word.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from xditd.client.file_mappings import AddressSpace
from xditd.ipc.errors import StaleSource
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.file_state import FileState

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def while_unchanged(path: str) -> Iterator[None]:
    """Read a file within this block, and record its state there: at the end, check that it did not change meanwhile.

    Raises:
        StaleSource: it did.
    """
    before = FileState.of_stat(os.stat(path))
    yield
    now = FileState.of_stat(os.stat(path))
    if now[:4] != before[:4]:
        raise StaleSource(
            f"{path}: changed while a loader read it ({before.differences(now)}); queue again once it is complete"
        )


class SourceFiles:
    """The files that weights are in, as they were when a loader read them."""

    def __init__(self, states: Mapping[str, FileState], *, are_mapped: bool) -> None:
        """Keep states by path. A mapped file stays the same if another one gets its name."""
        self._states = states
        self._are_mapped = are_mapped

    @classmethod
    def behind(cls, tensors: Iterable[torch.Tensor]) -> SourceFiles:
        """Record the files that these tensors are mapped from."""
        space = AddressSpace()
        found: dict[str, FileState] = {}
        for tensor in tensors:
            mapping = space.mapping_at(tensor.data_ptr()) if tensor.device.type == "cpu" and tensor.numel() else None
            if mapping is not None and mapping.path not in found and mapping.is_current():
                found[mapping.path] = FileState.of_stat(os.stat(mapping.path))
        return cls(found, are_mapped=True)

    @classmethod
    def of(cls, opened: LentFile) -> SourceFiles:
        """Record a file whose header was read, and that is opened again, by its path, when it is lent."""
        return cls({opened.path: opened.state}, are_mapped=False)

    def check(self) -> None:
        """Refuse to go on with a file that changed.

        Raises:
            StaleSource: names the file, and how a loader reads it again.
        """
        for path, before in self._states.items():
            try:
                now = FileState.of_stat(os.stat(path))
            except OSError:
                continue  # mapped pages outlive a name; whoever opens the file says what is wrong with it
            if self._are_mapped and now[:2] != before[:2]:
                continue
            if now[:4] != before[:4]:  # ctime alone changes with a link or the mode
                raise StaleSource(
                    f"{path}: changed since a loader read it ({before.differences(now)}); choose Unload Models and "
                    "Execution Cache in ComfyUI's menu, then queue again: the loader reads the file anew"
                )
