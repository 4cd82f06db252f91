"""Uploads through pinned buffers: every byte is copied, in stream order, and no source is read afterwards."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client.arenas import Arena
from xditd.ipc.errors import StaleSource
from xditd.ipc.transports import uploads
from xditd.ipc.transports.upload_pieces import FileStretch, Piece, Pieces
from xditd.ipc.transports.uploads import Tuning, can_upload, read_into, upload

gpu = pytest.mark.gpu
MIB = 2**20


SIZES = [40 * MIB + 3, 7, 16 * MIB, 1, 0, 33 * MIB, 5]


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return torch.randint(0, 256, (sum(SIZES),), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sources(whole: torch.Tensor) -> list[torch.Tensor]:
    """More than one buffer each, less than one, odd sizes, one byte, nothing; the odd ones at odd addresses."""
    return list(whole.split(SIZES))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def view(tensor: torch.Tensor) -> memoryview:
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def anonymous_bytes() -> int:
    """This process's resident memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def copy_all(pairs) -> list[int]:
    with upload(pairs) as copied:
        return list(copied)


def pieces_of(pairs, piece_bytes: int) -> list[Piece]:
    pieces = Pieces(pairs, piece_bytes)
    found = [pieces.make(number) for number in range(len(pieces))]
    numbers = [copy.number for piece in found for copy in piece.copies]
    assert pieces.of_pairs == [numbers.count(number) for number in range(len(pairs))]
    assert pieces.nbytes == sum(source.nbytes for source, _ in pairs)
    return found


@gpu
def test_every_byte_arrives(sources):
    targets = [torch.full_like(source, 7, device="cuda:0") for source in sources]
    assert copy_all(list(zip(sources, targets, strict=True))) == list(range(len(sources)))
    assert all(torch.equal(target.cpu(), source) for source, target in zip(sources, targets, strict=True))


@gpu
def test_memory_made_in_inference_mode_is_filled(sources):
    with torch.inference_mode():
        targets = [torch.zeros_like(source, device="cuda:0") for source in sources]
        copy_all(list(zip(sources, targets, strict=True)))
    assert all(torch.equal(target.cpu(), source) for source, target in zip(sources, targets, strict=True))


@gpu
def test_work_issued_after_a_pair_sees_it(sources):
    targets = [torch.zeros_like(source, device="cuda:0") for source in sources]
    sums = {}
    with upload(list(zip(sources, targets, strict=True))) as copied:
        for number in copied:
            sums[number] = targets[number].sum(dtype=torch.int64)
    assert {number: int(total) for number, total in sums.items()} == {
        number: int(source.sum(dtype=torch.int64)) for number, source in enumerate(sources)
    }


@gpu
def test_earlier_work_on_the_targets_comes_first():
    source = torch.ones(8 * MIB, dtype=torch.uint8)
    target = torch.zeros_like(source, device="cuda:0")
    for _ in range(200):
        target.add_(3)
    assert copy_all([(source, target)]) == [0]
    assert int(target.max()) == int(target.min()) == 1


@gpu
def test_an_upload_that_is_left_early_reads_no_more():
    source = torch.ones(200 * MIB, dtype=torch.uint8)
    first, second = torch.zeros(1, dtype=torch.uint8), source
    pairs = [(each, torch.zeros_like(each, device="cuda:0")) for each in (first, second)]
    with upload(pairs) as copied:
        assert next(copied) == 0
    left = pairs[1][1].clone()
    source.fill_(2)
    torch.cuda.synchronize()
    assert torch.equal(pairs[1][1], left)


@gpu
def test_one_upload_after_another_and_two_at_a_time(whole):
    """They use the same buffers, and no buffer is reused while the GPU still copies from it."""
    size = 3 * MIB + 1
    starts = [chance % (len(whole) - size) for chance in range(0, 10**9, 10**9 // 64)]
    targets = [torch.zeros(size, dtype=torch.uint8, device="cuda:0") for _ in starts]

    def run(numbers: range) -> None:
        for number in numbers:
            assert copy_all([(whole[starts[number] :][:size], targets[number])]) == [0]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [range(0, len(starts), 2), range(1, len(starts), 2)]))
    torch.cuda.synchronize()
    for start, target in zip(starts, targets, strict=True):
        assert torch.equal(target.cpu(), whole[start : start + size])


@gpu
@pytest.mark.parametrize("threads", [3, 14])
def test_no_more_buffers_are_made_than_one_upload_uses(whole, monkeypatch, threads: int):
    made: list[int] = []
    make = uploads._Buffer.__init__

    def note(buffer: uploads._Buffer, size_bytes: int) -> None:
        made.append(size_bytes)
        make(buffer, size_bytes)

    monkeypatch.setattr(uploads._Buffer, "__init__", note)
    monkeypatch.setattr(uploads._Buffer, "_kept", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)))
    target = torch.zeros(len(whole), dtype=torch.uint8, device="cuda:0")
    for _ in range(8):
        with upload([(whole, target)], Tuning(threads, MIB // 4)) as copied:
            assert list(copied) == [0]
    assert 2 <= len(made) <= 2 * threads
    assert torch.equal(target.cpu(), whole)


@gpu
def test_an_arena_is_filled_from_a_mapped_file(tmp_path: Path):
    tensors = {"a": torch.randn(3000, 3001).bfloat16(), "b": torch.randn(5), "c": torch.randn(64, 7).t().contiguous()}
    save_file(tensors, tmp_path / "x.safetensors")
    arena = Arena.copy_of(load_file(tmp_path / "x.safetensors"), "cuda:0")
    assert all(torch.equal(arena.tensors[name].cpu(), tensor) for name, tensor in tensors.items())
    assert arena.copied.host_to_device == sum(tensor.nbytes for tensor in tensors.values())
    arena.close()


@gpu
def test_stretches_of_a_file_arrive(whole, tmp_path: Path):
    """More than one buffer, from odd places; beside memory in the same upload."""
    path = tmp_path / "x"
    path.write_bytes(bytes_of(whole))
    places = [(0, 40 * MIB + 3), (5, 7), (17 * MIB + 1, 16 * MIB), (3, 0), (len(whole) - 1, 1)]
    targets = [torch.zeros(size, dtype=torch.uint8, device="cuda:0") for _, size in places]
    memory = torch.zeros(33 * MIB, dtype=torch.uint8, device="cuda:0")
    with path.open("rb") as file:
        stretches = [FileStretch(file.fileno(), at, size, "x") for at, size in places]
        pairs = [*zip(stretches, targets, strict=True), (whole[: 33 * MIB], memory)]
        assert copy_all(pairs) == list(range(6))
    for (at, size), target in zip(places, targets, strict=True):
        assert torch.equal(target.cpu(), whole[at : at + size])
    assert torch.equal(memory.cpu(), whole[: 33 * MIB])


@gpu
def test_many_small_ranges_of_a_file_share_pieces(whole, tmp_path: Path):
    """Side by side, with padding between them, and far apart; their order in the upload is any."""
    path = tmp_path / "x"
    path.write_bytes(bytes_of(whole))
    places = [(at, 4000 + at % 97) for at in range(0, 20 * MIB, 4096)] + [(60 * MIB, 9), (5 * MIB, 9 * MIB), (1, 3)]
    targets = [torch.zeros(size, dtype=torch.uint8, device="cuda:0") for _, size in places]
    with path.open("rb") as file:
        pairs = [
            (FileStretch(file.fileno(), at, size, "x"), to) for (at, size), to in zip(places, targets, strict=True)
        ]
        assert copy_all(pairs) == list(range(len(places)))
    for (at, size), target in zip(places, targets, strict=True):
        assert torch.equal(target.cpu(), whole[at : at + size])


@pytest.mark.parametrize(
    ("places", "pieces", "piece_bytes"),
    [
        pytest.param([(0, 10), (10, 5), (15, 1)], [(0, 16)], 100, id="side by side"),
        pytest.param([(0, 10), (4106, 6), (8209, 1)], [(0, 4112), (8209, 1)], 9000, id="padding, and a gap"),
        pytest.param([(0, 150), (150, 100)], [(0, 100), (100, 100), (200, 50)], 100, id="longer than a piece"),
        pytest.param([(0, 150), (90, 5), (200, 0), (95, 9)], [(0, 100), (100, 50), (90, 14)], 100, id="any order"),
        pytest.param([(0, 90), (95, 20)], [(0, 100), (100, 15)], 100, id="over the end of a piece"),
        pytest.param([(0, 90), (110, 20)], [(0, 100), (100, 30)], 100, id="beyond the end of a piece"),
        pytest.param([(0, 0)], [], 100, id="nothing"),
    ],
)
def test_pieces_have_every_byte_once(places, pieces, piece_bytes: int):
    target = torch.zeros(sum(size for _, size in places), dtype=torch.uint8)
    parts = target.split([size for _, size in places])
    pairs = [(FileStretch(3, at, size, "x"), part) for (at, size), part in zip(places, parts, strict=True)]
    found = pieces_of(pairs, piece_bytes)
    assert [(piece.start, piece.nbytes) for piece in found] == pieces
    source = torch.arange(10_000) % 251
    for piece in found:
        room = source[piece.start :][: piece.nbytes]
        for copy in piece.copies:
            assert 0 <= copy.offset_bytes <= copy.offset_bytes + copy.nbytes <= piece.nbytes
            begin = copy.target - target.data_ptr()
            target[begin : begin + copy.nbytes] += room[copy.offset_bytes :][: copy.nbytes] + 1
    assert torch.equal(target.long(), torch.cat([source[at : at + size] + 1 for at, size in places]))


def test_memory_between_two_tensors_is_not_read():
    host, target = torch.zeros(100, dtype=torch.uint8), torch.zeros(20, dtype=torch.uint8)
    pairs = [(host[:10], target[:10]), (host[11:21], target[10:])]
    assert [piece.nbytes for piece in pieces_of(pairs, 4096)] == [10, 10]


def test_ranges_of_two_files_share_no_piece():
    target = torch.zeros(20, dtype=torch.uint8)
    pairs = [(FileStretch(3, 0, 10, "x"), target[:10]), (FileStretch(4, 10, 10, "y"), target[10:])]
    assert [piece.file and piece.file.fd for piece in pieces_of(pairs, 4096)] == [3, 4]


@gpu
def test_a_file_that_was_cut_short_ends_the_upload(whole, tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(bytes_of(whole))
    target = torch.zeros(len(whole), dtype=torch.uint8, device="cuda:0")
    with path.open("rb") as file:
        stretch = FileStretch(file.fileno(), 0, len(whole), "x")
        os.truncate(path, 50 * MIB)
        with pytest.raises(StaleSource, match=f"x: truncated to {50 * MIB} bytes"):
            copy_all([(stretch, target)])
    assert copy_all([(whole, target)]) == [0]  # buffers and threads are as they were
    assert torch.equal(target.cpu(), whole)


@gpu
def test_an_upload_that_cannot_start_a_thread_ends(whole, monkeypatch):
    """Threads that have started have ended, too, before the error arrives."""
    started: list[int] = []
    start = uploads._thread.start_new_thread

    def start_two(*given) -> int:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(start(*given))
        return started[-1]

    monkeypatch.setattr(uploads._thread, "start_new_thread", start_two)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    source, target = whole.clone(), torch.zeros(len(whole), dtype=torch.uint8, device="cuda:0")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        copy_all([(source, target)])
    left = target.clone()
    source.fill_(9)
    torch.cuda.synchronize()
    assert torch.equal(target, left)
    monkeypatch.undo()
    assert copy_all([(whole, target)]) == [0]
    assert torch.equal(target.cpu(), whole)


@gpu
def test_no_copy_of_a_file_is_kept_in_memory(tmp_path: Path):
    size = 2048 * MIB
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.truncate(size)
    target = torch.ones(size, dtype=torch.uint8, device="cuda:0")
    with path.open("rb") as file:
        copy_all([(FileStretch(file.fileno(), 0, 600 * MIB, "x"), target[: 600 * MIB])])  # makes the buffers
        before = anonymous_bytes()
        copy_all([(FileStretch(file.fileno(), 0, size, "x"), target)])
        assert anonymous_bytes() - before < 64 * MIB
    assert int(target.max()) == 0


def test_reading_fills_exactly_what_was_asked_for(whole, tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(bytes_of(whole[: 3 * MIB]))
    room = torch.full((2 * MIB + 11,), 7, dtype=torch.uint8)
    with path.open("rb") as file:
        read_into(view(room[3:-3]), file.fileno(), 1001, "x")
    assert torch.equal(room[3:-3], whole[1001 : 1001 + 2 * MIB + 5])
    assert room[:3].tolist() == room[-3:].tolist() == [7, 7, 7]


def test_threads_share_one_descriptor(whole, tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(bytes_of(whole[: 8 * MIB]))
    room = torch.zeros(8 * MIB, dtype=torch.uint8)
    step = 100_003
    with path.open("rb") as file, ThreadPoolExecutor(4) as pool:
        reads = [
            pool.submit(read_into, view(room[at : at + step]), file.fileno(), at, "x") for at in range(0, 8 * MIB, step)
        ]
        for read in reads:
            read.result()
    assert torch.equal(room, whole[: 8 * MIB])


def test_reading_beyond_the_end_is_an_error_and_not_zeros(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    room = torch.full((600,), 7, dtype=torch.uint8)
    with path.open("rb") as file, pytest.raises(StaleSource, match="x: truncated to 1000 bytes"):
        read_into(view(room), file.fileno(), 500, "x")
    assert room[500:].tolist() == [7] * 100


def test_a_descriptor_that_cannot_be_read_is_an_error(tmp_path: Path):
    room = torch.zeros(10, dtype=torch.uint8)
    with (tmp_path / "x").open("wb") as file, pytest.raises(StaleSource, match="x: reading byte 4"):
        read_into(view(room), file.fileno(), 4, "x")


def test_nothing_to_upload():
    assert copy_all([]) == []


def test_only_plain_bytes_onto_a_gpu_can_be_uploaded():
    source = torch.zeros(4, 4)
    assert not can_upload(source, torch.zeros(4, 4))


@gpu
def test_what_must_be_converted_cannot_be_uploaded():
    target = torch.zeros(4, 5, device="cuda:0")
    assert can_upload(torch.zeros(4, 5), target)
    assert not can_upload(torch.zeros(4, 5, dtype=torch.float16), target)
    assert not can_upload(torch.zeros(5, 4).t(), target)
    assert not can_upload(torch.zeros(5, 4), target)
    assert not can_upload(target, target)
