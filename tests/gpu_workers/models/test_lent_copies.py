"""Copies of lent bytes, of which a later generation changes parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from forked_programs import ProgramServer

from xditd.gpu_workers.models.lent_copies import LentCopies, find_shared, written_ranges
from xditd.gpu_workers.models.own_buffer import OwnBuffer
from xditd.ipc.tensors import FileBlock, Fingerprint, HostShmBlock, Manifest, TensorSpec


def test_adjacent_tensors_are_one_range():
    specs = [
        TensorSpec("b", "uint8", (16,), 0, 16),
        TensorSpec("a", "uint8", (16,), 0, 0),
        TensorSpec("c", "float32", (4,), 0, 64),
        TensorSpec("empty", "uint8", (0,), 0, 90),
        TensorSpec("d", "uint8", (8,), 1, 0),
        TensorSpec("inside", "uint8", (4,), 0, 20),
    ]
    assert written_ranges(specs, {spec.name for spec in specs}) == {0: [range(32), range(64, 80)], 1: [range(8)]}
    assert written_ranges(specs, {"b", "inside"}) == {0: [range(16, 32)]}
    assert written_ranges(specs, ()) == {}


def test_two_ranks_copy_what_was_written(tmp_path: Path, fork_program: ProgramServer) -> None:
    done = fork_program(Path(__file__).with_name("rewriting_ranks.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: complete" for rank in range(2)]


def file_block(**changes: Any) -> FileBlock:
    given = {"fd": 3, "path": "/x", "device": 1, "inode": 2, "mtime_ns": 3, "ctime_ns": 4, "size_bytes": 4096}
    return FileBlock(**(given | {"fingerprint": Fingerprint(length_bytes=0, digest=bytes(16))} | changes))


def lent(block: Any, *specs: TensorSpec, others: Any = ()) -> tuple[Manifest, LentCopies]:
    """Load as a rank does that can view none of these tensors."""
    manifest = Manifest(label="x", blocks=(block,), tensors=specs)
    shared = find_shared(manifest, specs, others)
    own = OwnBuffer.allocate([spec for spec in specs if spec.name not in shared], torch.device("cpu"))
    return manifest, LentCopies(own, {}, shared)


def test_components_share_the_copies_of_one_file():
    a, b, c = (TensorSpec(name, "uint8", (1024,), 0, at) for name, at in (("a", 8), ("b", 1032), ("c", 2056)))
    first = lent(file_block(), a, b, c)
    tensors = first[1].tensors
    second = lent(file_block(fd=9, path="/y"), a, b, others=[first])
    assert second[1].apart is None
    assert second[1].buffers == []
    assert {name: each.data_ptr() for name, each in second[1].tensors.items()} == {
        name: tensors[name].data_ptr() for name in "ab"
    }
    # Also of one that shares itself, by other names, and beside tensors that the other has not copied.
    third = lent(file_block(), TensorSpec("renamed", "uint8", (1024,), 0, 8), b, c, others=[second])
    assert third[1].shared.keys() == {"renamed", "b"}
    assert third[1].apart.tensors.keys() == {"c"}
    assert third[1].has_apart(third[0].tensors)


def test_copies_of_other_bytes_and_of_little_use_are_not_shared():
    a, b, c = (TensorSpec(name, "uint8", (1024,), 0, at) for name, at in (("a", 8), ("b", 1032), ("c", 2056)))
    first = lent(file_block(), a, b, c)
    assert not lent(file_block(), a, others=[first])[1].shared, "two thirds of the memory would have no use"
    shm = HostShmBlock(fd=0, inode=2, size_bytes=4096, fingerprint=Fingerprint(length_bytes=0, digest=bytes(16)))
    others = [lent(shm, a, b, c)]
    assert not lent(shm, a, b, c, others=others)[1].shared, "shared memory may have been written to"
    for change in ({"inode": 5}, {"ctime_ns": 5}, {"size_bytes": 8192}, {"device": 5}):
        assert not lent(file_block(**change), a, b, c, others=[first])[1].shared
    moved = [TensorSpec(spec.name, "uint8", (1024,), 0, spec.offset_bytes + 8) for spec in (a, b, c)]
    assert not lent(file_block(), *moved, others=[first])[1].shared
    other_dtype = [TensorSpec(spec.name, "float32", (256,), 0, spec.offset_bytes) for spec in (a, b, c)]
    assert not lent(file_block(), *other_dtype, others=[first])[1].shared
