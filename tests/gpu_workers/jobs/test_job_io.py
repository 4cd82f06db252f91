"""Inputs and outputs of jobs in a client's block: copied, checked, and never beyond its end."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xditd.gpu_workers.jobs import job_io
from xditd.gpu_workers.jobs.job_io import JobIo
from xditd.ipc.errors import BadRequest, ProcessGone, StaleSource
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.tensors import HostShmBlock, IoTensor
from xditd.ipc.transports.host_shm import HostArena, map_shm

SIZE = 2 * 2**20


def place(shape: tuple[int, ...], dtype: Any = "float32", offset_bytes: int = 0) -> IoTensor:
    return IoTensor(offset_bytes=offset_bytes, dtype=dtype, shape=shape)


@pytest.fixture
def me() -> ProcessIdentity:
    return identify(os.getpid())


@pytest.fixture
def io() -> Iterator[JobIo]:
    io = JobIo(torch.device("cpu"))
    yield io
    io.close()


@pytest.fixture
def arena() -> Iterator[HostArena]:
    arena = HostArena(SIZE)
    yield arena
    arena.close()


def test_an_input_is_a_copy(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    mine = arena.tensor(256, "bfloat16", (2, 3))
    mine.copy_(torch.arange(6.0).view(2, 3))
    read = io.open(arena.block(), me).read("x", place((2, 3), "bfloat16", 256))
    mine.zero_()
    assert read.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read.dtype == torch.bfloat16
    del mine


def test_an_output_arrives_in_the_dtype_that_was_asked_for(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    opened = io.open(arena.block(), me)
    opened.write("x", place((3,), "float16", 64), torch.tensor([1.5, -2.0, 65504.0], dtype=torch.float64))
    opened.write("y", place((2, 2), "float32", 4096), torch.arange(4.0).view(2, 2).T)
    assert arena.tensor(64, "float16", (3,)).tolist() == [1.5, -2.0, 65504.0]
    assert arena.tensor(4096, "float32", (2, 2)).tolist() == [[0, 2], [1, 3]]


class Copies(TorchDispatchMode):
    """Sees what is copied; ``is_whole`` says of each copy whether both sides are one range of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.is_whole: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "copy_":
            self.is_whole.append(args[0].is_contiguous() and args[1].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_parts_of_a_video_are_copied_as_ranges_of_memory(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    where, video = place((2, 3, 5, 4, 4), offset_bytes=64), torch.randn(2, 3, 5, 4, 4)
    opened = io.open(arena.block(), me)
    with Copies() as copies:
        for start, frames in ((0, 1), (1, 4)):
            opened.write_part(where, 2, start, video.narrow(2, start, frames).contiguous())
        opened.write_part(place((2, 3), offset_bytes=2**20), 0, 0, torch.ones(2, 3))
    assert copies.is_whole == [True] * (2 * 2 * 3 + 1)
    assert torch.equal(arena.tensor(64, "float32", where.shape), video)
    assert torch.equal(arena.tensor(2**20, "float32", (2, 3)), torch.ones(2, 3))


def test_nothing_beside_an_output_is_touched(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    with arena.view(0, SIZE) as view:
        view[:] = b"\x05" * SIZE
    io.open(arena.block(), me).write("x", place((3,), "uint8", 64), torch.tensor([1, 2, 3]))
    with arena.view(0, SIZE) as view:
        assert view[:64] == b"\x05" * 64
        assert view[64:67] == b"\x01\x02\x03"
        assert view[67:] == b"\x05" * (SIZE - 67)


def test_a_place_of_another_shape_is_refused(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    opened = io.open(arena.block(), me)
    with pytest.raises(BadRequest, match=r"out: the place for it is \[3\], but the result is \[4\]"):
        opened.write("out", place((3,)), torch.zeros(4))
    with pytest.raises(BadRequest, match=r"\[1, 4\], but the result will be \[4\]"):
        opened.check("out", place((1, 4)), (4,))
    opened.check("out", place((4,)), (4,))


@pytest.mark.parametrize(
    "described",
    [
        place((SIZE // 4 + 1,)),
        place((SIZE // 4,), offset_bytes=64),
        place((1,), offset_bytes=SIZE),
        place((0,), offset_bytes=SIZE + 64),
        place((1,), offset_bytes=2**46),
        place((2**40,) * 8),
        place((2**31, 2**31, 4)),  # 2**64 elements
        place((0, 2**40, 2**40)),
        place((1,), offset_bytes=4),
        place((1,), "uint8", offset_bytes=63),
    ],
    ids=str,
)
def test_what_does_not_lie_in_the_block_is_a_bad_request(
    io: JobIo, arena: HostArena, me: ProcessIdentity, described: IoTensor
) -> None:
    assert msgspec.convert(msgspec.to_builtins(described), IoTensor) == described  # the wire lets it pass
    opened = io.open(arena.block(), me)
    with pytest.raises(BadRequest, match="latents"):
        opened.read("latents", described)
    with pytest.raises(BadRequest, match="latents"):
        opened.check("latents", described, described.shape)


def test_the_last_bytes_of_a_block_can_be_used(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    opened = io.open(arena.block(), me)
    opened.write("x", place((16,), "float32", SIZE - 64), torch.arange(16.0))
    assert opened.read("x", place((16,), "float32", SIZE - 64)).tolist() == list(range(16))
    assert opened.read("all", place((SIZE // 4,))).numel() == SIZE // 4


def test_digests(io: JobIo, arena: HostArena, me: ProcessIdentity) -> None:
    with arena.view(100, 3) as view:
        view[:] = b"abc"
    opened = io.open(arena.block(), me)
    assert opened.digest(100, 3) == blake2b(b"abc", digest_size=16).digest()
    for offset, length in ((SIZE - 2, 3), (2**46, 1), (SIZE, 1)):
        with pytest.raises(BadRequest, match=f"of {SIZE}"):
            opened.digest(offset, length)


def test_a_block_is_mapped_once_however_often_it_is_used(
    io: JobIo, arena: HostArena, me: ProcessIdentity, open_fds: Callable[[], int]
) -> None:
    io.open(arena.block(), me)
    before = open_fds()
    for number in range(20):
        opened = io.open(arena.block(), me)
        opened.write("x", place((1,)), torch.tensor([float(number)]))
        assert opened.read("x", place((1,))).item() == number
    assert open_fds() == before


def test_mappings_are_bounded_and_the_oldest_go_first(
    io: JobIo, me: ProcessIdentity, open_fds: Callable[[], int]
) -> None:
    arenas = [HostArena(1) for _ in range(40)]
    io.open(arenas[0].block(), me)
    before = open_fds()
    for arena in arenas:
        io.open(arenas[0].block(), me)  # in use all the time, so it stays
        io.open(arena.block(), me)
    assert open_fds() - before == 15
    closed = arenas[0].block()
    arenas[0].close()
    io.open(closed, me)  # needs no descriptor of the client's: it is mapped
    gone = arenas[1].block()
    arenas[1].close()
    with pytest.raises(StaleSource):
        io.open(gone, me)
    for arena in arenas[2:]:
        arena.close()


def test_a_client_that_is_gone_is_forgotten(
    io: JobIo, arena: HostArena, me: ProcessIdentity, spawn_other: Callable[[], Any], open_fds: Callable[[], int]
) -> None:
    io.open(arena.block(), me)
    other = spawn_other()
    before = open_fds()
    owner = msgspec.convert(other.identity, ProcessIdentity)
    block = msgspec.convert(other.ask("export", size_bytes=10), HostShmBlock)
    io.open(block, owner).write("x", place((1,), "uint8"), torch.tensor([9]))
    assert other.ask("peek", offset=0, length=1) == "09"
    other.kill()
    io.open(block, owner).write("x", place((1,), "uint8"), torch.tensor([9]))  # mapped still
    io.forget(owner)
    with pytest.raises(ProcessGone):
        io.open(block, owner)
    assert open_fds() == before - 2  # the two pipes to the process that is gone
    io.open(arena.block(), me)
    io.forget(owner)


def test_blocks_that_their_client_closed_are_swept(io: JobIo, me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    """Also where the number of the descriptor means another block by now."""
    kept, closed, replaced = HostArena(1), HostArena(1), HostArena(1)
    for arena in (kept, closed, replaced):
        io.open(arena.block(), me)
    io.unmap_closed()
    assert len(io) == 3
    before = open_fds()
    number = replaced.block().fd
    replaced.close()
    other = HostArena(1)
    assert other.block().fd == number
    closed.close()
    io.unmap_closed()
    assert len(io) == 1
    assert open_fds() == before - 2 - 2  # the arena's two and the mapping's two
    other.close()
    kept.close()


def test_blocks_of_a_dead_client_are_swept(io: JobIo, spawn_other: Callable[[], Any]) -> None:
    other = spawn_other()
    owner = msgspec.convert(other.identity, ProcessIdentity)
    io.open(msgspec.convert(other.ask("export", size_bytes=10), HostShmBlock), owner)
    io.unmap_closed()
    assert len(io) == 1
    other.kill()
    io.unmap_closed()
    assert len(io) == 0


def test_the_same_inode_number_of_another_file_system_is_another_file(
    io: JobIo, arena: HostArena, me: ProcessIdentity, tmp_path: Any
) -> None:
    """Inodes are numbered within each: what stands at the client's descriptor by now may bear the block's number."""
    fd = os.open(tmp_path, os.O_RDONLY)
    found = os.fstat(fd)
    assert job_io._has_descriptor(me, fd, (found.st_dev, found.st_ino))
    assert not job_io._has_descriptor(me, fd, (found.st_dev + 1, found.st_ino))
    os.close(fd)
    block = arena.block()
    shared = os.fstat(block.fd)
    mapping = map_shm(block, me)
    assert mapping.identity == (shared.st_dev, shared.st_ino)
    mapping.close()


def test_a_file_in_place_of_shared_memory(io: JobIo, arena: HostArena, me: ProcessIdentity, tmp_path: Any) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        as_if = msgspec.structs.replace(
            arena.block(), fd=file.fileno(), inode=os.fstat(file.fileno()).st_ino, size_bytes=4096
        )
        with pytest.raises(StaleSource, match="not a memfd"):
            io.open(as_if, me)
    assert path.read_bytes() == bytes(4096)


def test_a_hundred_jobs_leave_nothing(me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds()
    io = JobIo(torch.device("cpu"))
    for _ in range(100):
        arena = HostArena(1)
        opened = io.open(arena.block(), me)
        opened.write("x", place((4,)), opened.read("y", place((4,), offset_bytes=64)))
        with pytest.raises(BadRequest):
            opened.read("x", place((SIZE,)))
        arena.close()
    io.close()
    assert open_fds() == before
