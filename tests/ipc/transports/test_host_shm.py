"""Sealed shared memory: the same bytes in two processes, without a copy, and freed afterwards."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import gc
import mmap
import os
import resource
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from xditd.ipc import limits
from xditd.ipc.errors import Internal, OutOfMemory, ProcessGone, StaleSource
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.tensors import Fingerprint, HostShmBlock
from xditd.ipc.transports.fingerprints import check_fingerprint
from xditd.ipc.transports.host_shm import HostArena, map_shm
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES

PAGE = mmap.PAGESIZE


@pytest.fixture
def me() -> ProcessIdentity:
    return identify(os.getpid())


@pytest.fixture
def arena() -> Any:
    arena = HostArena(5_000)
    yield arena
    arena.close()


def block_of(described: Any) -> HostShmBlock:
    return msgspec.convert(described, HostShmBlock)


def changed(block: HostShmBlock, **fields: Any) -> HostShmBlock:
    return msgspec.structs.replace(block, **fields)


def mapped_kib(name: str) -> int:
    """How much of this process's address space maps memfds of this name."""
    total = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if f"/memfd:{name}" in line:
                start, end = line.split()[0].split("-")
                total += int(end, 16) - int(start, 16)
    return total // 1024


def test_sizes_are_whole_pages_of_two_mebibytes(arena: HostArena) -> None:
    assert arena.size_bytes == ALLOCATION_BYTES
    assert arena.block().size_bytes == ALLOCATION_BYTES
    tiny = HostArena(0)
    assert tiny.size_bytes == ALLOCATION_BYTES
    tiny.close()


def test_the_size_is_sealed(arena: HostArena) -> None:
    fd = arena.block().fd
    for size in (0, PAGE, ALLOCATION_BYTES * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, 1033, 0x0008)  # nor may another seal stop the writing
    assert os.fstat(fd).st_size == ALLOCATION_BYTES


def test_another_process_reads_what_is_written_here_and_the_other_way_round(
    arena: HostArena, me: ProcessIdentity, other_process: Any
) -> None:
    tensor = arena.tensor(256, "bfloat16", (3, 4))
    tensor.fill_(1.5)
    exporter = msgspec.to_builtins(me)
    other_process.ask("map", block=msgspec.to_builtins(arena.block()), exporter=exporter, is_writable=True)
    assert other_process.ask("read", offset=256, length=24) == "c03f" * 12
    tensor[0, 0] = 2.0  # after it was mapped: the same memory, not a copy
    assert other_process.ask("read", offset=256, length=4) == "0040c03f"
    other_process.ask("write", offset=258, content="0040")
    assert tensor.flatten()[:3].tolist() == [2.0, 2.0, 1.5]
    del tensor
    assert other_process.ask("unmap") is None


def test_reading_what_another_process_made(me: ProcessIdentity, spawn_other: Callable[[], Any]) -> None:
    other = spawn_other()
    block = block_of(other.ask("export", size_bytes=10, content="0102"))
    mapping = map_shm(block, msgspec.convert(other.identity, ProcessIdentity))
    assert mapping.bytes_tensor()[:3].tolist() == [1, 2, 0]
    check_fingerprint(mapping.bytes_tensor(), block.fingerprint, "x")
    other.ask("poke", offset=1, content="ff")
    assert mapping.bytes_tensor()[:3].tolist() == [1, 255, 0]
    with pytest.raises(StaleSource):
        check_fingerprint(mapping.bytes_tensor(), block.fingerprint, "x")
    mapping.close()


def test_bytes_outlive_the_process_that_made_them_while_they_are_mapped(spawn_other: Callable[[], Any]) -> None:
    other = spawn_other()
    owner = msgspec.convert(other.identity, ProcessIdentity)
    block = block_of(other.ask("export", size_bytes=10, content="0102"))
    mapping = map_shm(block, owner)
    other.kill()
    assert mapping.bytes_tensor()[:2].tolist() == [1, 2]
    mapping.close()
    with pytest.raises(ProcessGone, match=str(owner.pid)):
        map_shm(block, owner)


def test_a_pid_with_another_start_time_is_another_process(arena: HostArena, me: ProcessIdentity) -> None:
    with pytest.raises(ProcessGone):
        map_shm(arena.block(), ProcessIdentity(pid=me.pid, start_ticks=me.start_ticks - 1))


def test_what_is_not_the_lent_segment_is_not_mapped(arena: HostArena, me: ProcessIdentity, tmp_path: Any) -> None:
    block = arena.block()
    with pytest.raises(StaleSource, match="inode"):
        map_shm(changed(block, inode=block.inode + 1), me)
    for size in (block.size_bytes - PAGE, block.size_bytes * 2, 0, limits.MAX_BYTES):
        with pytest.raises(StaleSource, match="bytes"):
            map_shm(changed(block, size_bytes=size), me)

    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as file:
        as_if = changed(block, fd=file.fileno(), inode=path.stat().st_ino, size_bytes=PAGE)
        with pytest.raises(StaleSource, match="not a memfd"):
            map_shm(as_if, me)


@pytest.mark.parametrize("seals", [0, 0x0004, 0x0001])
def test_a_memfd_that_can_shrink_is_not_mapped(me: ProcessIdentity, seals: int) -> None:
    fd = os.memfd_create("xditd-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    if seals:
        fcntl.fcntl(fd, 1033, seals)
    print_ = Fingerprint(length_bytes=0, digest=bytes(16))
    block = HostShmBlock(fd=fd, inode=os.fstat(fd).st_ino, size_bytes=PAGE, fingerprint=print_)
    with pytest.raises(StaleSource, match="not sealed against shrinking"):
        map_shm(block, me)
    os.close(fd)


def test_an_empty_memfd_is_refused(me: ProcessIdentity) -> None:
    fd = os.memfd_create("xditd-test", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, 1033, 0x0002)
    print_ = Fingerprint(length_bytes=0, digest=bytes(16))
    with pytest.raises(StaleSource, match="cannot be mapped"):
        map_shm(HostShmBlock(fd=fd, inode=os.fstat(fd).st_ino, size_bytes=0, fingerprint=print_), me)
    os.close(fd)


def test_a_closed_arena_cannot_be_mapped(me: ProcessIdentity, spawn_other: Callable[[], Any]) -> None:
    arena = HostArena(1)
    block = arena.block()
    arena.close()
    with pytest.raises(StaleSource):
        map_shm(block, me)
    other = spawn_other()
    block = block_of(other.ask("export", size_bytes=10))
    other.ask("close_arena")
    with pytest.raises(StaleSource, match="lend it again"):
        map_shm(block, msgspec.convert(other.identity, ProcessIdentity))


def test_a_view_that_is_alive_keeps_the_memory(me: ProcessIdentity) -> None:
    arena = HostArena(1)
    tensor = arena.tensor(0, "uint8", (4,))
    with pytest.raises(Internal, match="still alive"):
        arena.close()
    tensor.fill_(3)  # no fault
    mapping = map_shm(arena.block(), me)
    view = mapping.bytes_tensor()
    with pytest.raises(Internal, match="still alive"):
        mapping.close()
    assert view[:4].tolist() == [3, 3, 3, 3]
    del tensor, view
    mapping.close()
    arena.close()


def test_closing_twice_closes_nothing_of_anybody_else(me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    arena = HostArena(1)
    mapping = map_shm(arena.block(), me)
    mapping.close()
    arena.close()
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]  # takes the numbers that were freed
    mapping.close()
    arena.close()
    for fd in fds:
        os.close(fd)  # raises if the descriptor was closed by mistake


def test_a_hundred_cycles_leave_nothing(me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds(), mapped_kib("cycle")
    for number in range(100):
        arena = HostArena(3 * 2**20, name="cycle")
        tensor = arena.tensor(256, "int64", (7,))
        mapping = map_shm(arena.block(), me, is_writable=bool(number % 2))
        tensor.fill_(number)
        assert mapping.bytes_tensor()[256] == number
        del tensor
        mapping.close()
        arena.close()
    assert (open_fds(), mapped_kib("cycle")) == before


def test_refused_mappings_leave_nothing(arena: HostArena, me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    for _ in range(20):
        with pytest.raises(StaleSource):
            map_shm(changed(arena.block(), inode=1), me)
    assert open_fds() == before


def test_an_arena_that_nobody_closed_goes_with_its_last_view(open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds(), mapped_kib("forgotten")
    arena = HostArena(1, name="forgotten")
    tensor = arena.tensor(0, "uint8", (4,))
    del arena
    gc.collect()
    tensor.fill_(1)
    del tensor
    gc.collect()
    assert (open_fds(), mapped_kib("forgotten")) == before


@pytest.mark.parametrize("size", [2**47, 2**62, 2**63, 2**70])
def test_more_than_there_is(open_fds: Callable[[], int], size: int) -> None:
    before = open_fds()
    for _ in range(3):
        with pytest.raises(OutOfMemory, match=f"of {size} bytes"):
            HostArena(size)
    assert open_fds() == before


def test_no_descriptor_left(me: ProcessIdentity, arena: HostArena, no_free_fd: Callable[[], None]) -> None:
    block = arena.block()
    no_free_fd()
    with pytest.raises(OutOfMemory, match="open files"):
        HostArena(1)
    with pytest.raises(OutOfMemory, match="open files"):
        map_shm(block, me)


def test_views_are_typed_and_shaped(arena: HostArena) -> None:
    assert arena.tensor(0, "float8_e4m3fn", (2, 0, 3)).shape == (2, 0, 3)
    scalar = arena.tensor(512, "float64", ())
    scalar.fill_(2.5)
    with arena.view(512, 8) as view:
        assert bytes(view) == torch.tensor(2.5, dtype=torch.float64).view(1).view(torch.uint8).numpy().tobytes()
    del scalar


def test_the_sample_ends_with_the_arena(arena: HostArena) -> None:
    assert arena.block(arena.size_bytes - 10).fingerprint.length_bytes == 10
    assert arena.block(100).fingerprint.offset_bytes == 100


def test_a_forked_child_shares_the_memory_and_takes_nothing_with_it(arena: HostArena, me: ProcessIdentity) -> None:
    """A client's helper processes (data loaders) come and go by fork."""
    with arena.view(0, 2) as view:
        view[0] = 7
        child = os.fork()
        if not child:
            view[1] = view[0]
            view.release()
            arena.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert bytes(view) == b"\x07\x07"
    mapping = map_shm(arena.block(), me)
    mapping.close()


def test_a_read_only_mapping_cannot_be_written_to(arena: HostArena, me: ProcessIdentity) -> None:
    mapping = map_shm(arena.block(), me)
    address = mapping.bytes_tensor().data_ptr()
    child = os.fork()
    if not child:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.memset(address, 1, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0  # ended by a signal
    mapping.close()
