"""What ranks do together: leaving a block that failed."""

from __future__ import annotations

import traceback
import weakref

import pytest
import torch

from xditd.gpu_workers.parallel.fellows import together
from xditd.ipc.errors import OutOfMemory


class _Mapping:
    """Stands for a mapped block that somebody will unmap once nobody looks at it."""


def _fail(mapping: _Mapping) -> None:
    view = mapping
    raise torch.OutOfMemoryError(f"no room beside {type(view).__name__}\nand more")


def _use(seen: list[weakref.ref[_Mapping]]) -> None:
    mapping = _Mapping()
    seen.append(weakref.ref(mapping))
    with together():
        _fail(mapping)


def test_want_of_memory_is_typed_and_holds_nothing() -> None:
    seen: list[weakref.ref[_Mapping]] = []
    with pytest.raises(OutOfMemory, match=r"the GPU has no room: no room beside _Mapping$") as caught:
        _use(seen)
    traceback.clear_frames(caught.value.__traceback__)  # as those do who then unmap
    assert seen[0]() is None
