"""Ranks that are late in turn agree; errors of a block are typed, and hold no views."""

from __future__ import annotations

import traceback
import weakref
from pathlib import Path

import pytest
import torch
from forked_programs import ProgramServer

from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.ipc.errors import OutOfMemory


def test_every_rank_learns_the_same(tmp_path: Path, fork_program: ProgramServer) -> None:
    done = fork_program(Path(__file__).with_name("meeting_ranks.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: agreed" for rank in range(4)]


class _Mapping:
    """Stands for a mapped block, which must have no references when it is unmapped."""


def _fail(mapping: _Mapping) -> None:
    view = mapping
    raise torch.OutOfMemoryError(f"no room beside {type(view).__name__}\nand more")


def _use(seen: list[weakref.ref[_Mapping]]) -> None:
    mapping = _Mapping()
    seen.append(weakref.ref(mapping))
    with raise_on_all_ranks():
        _fail(mapping)


def test_a_host_without_memory_is_an_error_of_all_ranks_too() -> None:
    """Such as for the scratch buffer of packed weights: other ranks must not wait for this one."""
    with (
        pytest.raises(OutOfMemory, match=r"no room on the worker's device: .*can't allocate memory"),
        raise_on_all_ranks(),
    ):
        torch.empty(2**46, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a defect"), raise_on_all_ranks():
        raise RuntimeError("a defect")


def test_out_of_memory_is_typed_and_holds_nothing() -> None:
    seen: list[weakref.ref[_Mapping]] = []
    with pytest.raises(OutOfMemory, match=r"the GPU has no room: no room beside _Mapping$") as caught:
        _use(seen)
    traceback.clear_frames(caught.value.__traceback__)  # as callers do before they unmap
    assert seen[0]() is None
