"""Blocks that a rank has mapped: each once, counted, verified, and unmapped even when something fails."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from xditd.gpu_workers.weights.blocks import OpenBlocks
from xditd.ipc.errors import ForeignGpu, Internal, ProcessGone, StaleSource
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.tensors import CudaIpcBlock, FileBlock, Fingerprint, HostShmBlock
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.host_shm import HostArena

NOWHERE = CudaIpcBlock(
    device_uuid="GPU-elsewhere",
    handle=bytes(64),
    size_bytes=2**21,
    fingerprint=Fingerprint(length_bytes=0, digest=bytes(16)),
)


@pytest.fixture
def me() -> ProcessIdentity:
    return identify(os.getpid())


@pytest.fixture
def blocks() -> OpenBlocks:
    return OpenBlocks(torch.device("cpu"), "")


@pytest.fixture
def arena() -> Iterator[HostArena]:
    arena = HostArena(10_000)
    with arena.view(0, 4) as view:
        view[:] = b"abcd"
    yield arena
    arena.close()


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[LentFile]:
    save_file({"a": torch.arange(2000.0)}, tmp_path / "x.safetensors")
    lent = LentFile(str(tmp_path / "x.safetensors"))
    yield lent
    lent.close()


def test_a_block_is_the_lenders_memory(blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity) -> None:
    opened = blocks.acquire(arena.block(), me)
    assert opened.bytes.numel() == arena.size_bytes
    assert bytes(opened.bytes[:4].tolist()) == b"abcd"
    with arena.view(0, 1) as view:
        view[0] = 7
    assert opened.bytes[0] == 7
    blocks.release(opened)
    assert len(blocks) == 0


def test_two_users_share_one_mapping(blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity) -> None:
    first, second = blocks.acquire(arena.block(), me), blocks.acquire(arena.block(4096), me)
    assert first is second
    assert (len(blocks), first.users) == (1, 2)
    blocks.release(first)
    assert bytes(second.bytes[:4].tolist()) == b"abcd"
    blocks.release(second)
    assert len(blocks) == 0


def test_releasing_too_often_is_our_own_defect(blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity) -> None:
    opened = blocks.acquire(arena.block(), me)
    blocks.release(opened)
    with pytest.raises(Internal, match="more often"):
        blocks.release(opened)


def test_a_view_that_is_alive_stops_the_unmapping(blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity) -> None:
    """Better an error than weights that read from nowhere."""
    opened = blocks.acquire(arena.block(), me)
    view = opened.bytes[:4]
    with pytest.raises(Internal, match="still alive"):
        blocks.release(opened)
    assert view.tolist() == list(b"abcd")


def test_files_are_mapped_and_watched(blocks: OpenBlocks, lent: LentFile, me: ProcessIdentity) -> None:
    opened = blocks.acquire(lent.block(), me)
    opened.check_unchanged()
    os.truncate(lent.path, 100)
    with pytest.raises(StaleSource, match="changed since it was lent"):
        opened.check_unchanged()
    blocks.release(opened)


def test_a_rewritten_file_is_another_block(blocks: OpenBlocks, lent: LentFile, me: ProcessIdentity) -> None:
    old = blocks.acquire(lent.block(), me)
    os.utime(lent.path, ns=(1, 1))
    again = LentFile(lent.path)
    new = blocks.acquire(again.block(), me)
    assert new is not old
    assert len(blocks) == 2
    blocks.release(old)
    blocks.release(new)
    again.close()


@pytest.mark.parametrize("is_open", [False, True])
def test_other_bytes_than_were_lent_are_refused(
    blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity, is_open: bool, open_fds: Callable[[], int]
) -> None:
    block = arena.block()
    opened = blocks.acquire(block, me) if is_open else None
    with arena.view(0, 1) as view:
        view[0] += 1
    before = open_fds()
    for _ in range(5):
        with pytest.raises(StaleSource, match="not those that were lent"):
            blocks.acquire(block, me)
    assert open_fds() == before
    assert len(blocks) == int(is_open)
    if opened is not None:
        assert opened.users == 1
        blocks.release(opened)
    assert len(blocks) == 0


@pytest.mark.parametrize("is_open", [False, True])
def test_a_wrong_size_is_refused_also_where_the_block_is_mapped_already(
    blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity, is_open: bool
) -> None:
    """Tensors are checked against the described size: a second description must not reach beyond the mapping."""
    opened = blocks.acquire(arena.block(), me) if is_open else None
    for size in (2**30, arena.size_bytes - 4096):
        with pytest.raises(StaleSource):
            blocks.acquire(msgspec.structs.replace(arena.block(), size_bytes=size), me)
    assert len(blocks) == int(is_open)
    if opened is not None:
        blocks.release(opened)


def test_a_fingerprint_beyond_the_block_is_refused(blocks: OpenBlocks, arena: HostArena, me: ProcessIdentity) -> None:
    beyond = Fingerprint(offset_bytes=2**40, length_bytes=4096, digest=bytes(16))
    with pytest.raises(StaleSource, match="are mapped"):
        blocks.acquire(msgspec.structs.replace(arena.block(), fingerprint=beyond), me)
    assert len(blocks) == 0


def test_device_memory_elsewhere_is_refused_by_name(blocks: OpenBlocks, me: ProcessIdentity) -> None:
    assert not blocks.is_local(NOWHERE)
    with pytest.raises(ForeignGpu, match="GPU-elsewhere"):
        blocks.acquire(NOWHERE, me)


def test_the_same_numbers_in_two_processes_are_two_blocks(blocks: OpenBlocks, spawn_other: Callable[[], Any]) -> None:
    opened = []
    for content in ("01", "02"):
        other = spawn_other()
        block = msgspec.convert(other.ask("export", size_bytes=5000, content=content), HostShmBlock)
        opened.append(blocks.acquire(block, msgspec.convert(other.identity, ProcessIdentity)))
    assert [int(one.bytes[0]) for one in opened] == [1, 2]
    for one in opened:
        blocks.release(one)


def test_a_lender_that_dies(blocks: OpenBlocks, spawn_other: Callable[[], Any]) -> None:
    other = spawn_other()
    owner = msgspec.convert(other.identity, ProcessIdentity)
    block = msgspec.convert(other.ask("export", size_bytes=5000, content="09"), HostShmBlock)
    opened = blocks.acquire(block, owner)
    other.kill()
    assert opened.bytes[0] == 9
    blocks.release(opened)
    with pytest.raises(ProcessGone):
        blocks.acquire(block, owner)
    assert len(blocks) == 0


def test_a_hundred_cycles_leave_nothing(
    blocks: OpenBlocks, lent: LentFile, arena: HostArena, me: ProcessIdentity, open_fds: Callable[[], int]
) -> None:
    gc.collect()
    before = open_fds()
    maps = Path("/proc/self/maps")
    lines = maps.read_text().count(lent.path), maps.read_text().count("/memfd:xditd")
    described: tuple[FileBlock, HostShmBlock] = (lent.block(), arena.block())
    for _ in range(100):
        for block in described:
            blocks.release(blocks.acquire(block, me))
    assert open_fds() == before
    assert (maps.read_text().count(lent.path), maps.read_text().count("/memfd:xditd")) == lines
