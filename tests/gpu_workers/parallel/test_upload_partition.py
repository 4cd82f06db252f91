"""The partition of uploads: every byte once, wherever shares end."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from xditd.gpu_workers.parallel.upload_partition import CopyRange, clip_ranges, join_ranges, split
from xditd.ipc.tensors import TensorSpec
from xditd.ipc.transports.tensor_views import ALLOCATION_BYTES, place

MIB = 2**20


def spec(name: str, block: int, offset_bytes: int, count: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="uint8", shape=(count,), block=block, offset_bytes=offset_bytes)


@pytest.fixture(scope="module")
def blocks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (20 * MIB,), dtype=torch.uint8, generator=generator) for _ in range(2)]


def checkpoint(seed: int) -> list[TensorSpec]:
    """Tensors of odd sizes in two blocks, some of them empty, with gaps between some."""
    draw = random.Random(seed)
    specs = []
    for block in range(2):
        end = draw.randrange(1000)
        for number in range(40):
            size = draw.choice([0, 1, 255, 256, 4097, draw.randrange(4 * MIB)])
            specs.append(spec(f"{block}.{number}", block, end, size))
            end += size + draw.choice([0, 0, 0, 13])
    return specs


def test_neighbours_in_block_and_buffer_are_joined() -> None:
    specs = [spec("a", 0, 8, 256), spec("b", 0, 264, 512), spec("c", 0, 776, 3), spec("d", 0, 779, 256)]
    assert join_ranges(specs, [0, 256, 768, 1024]) == [(0, 8, 0, 771), (0, 779, 1024, 256)]


def test_gaps_overlaps_and_other_blocks_are_not_joined() -> None:
    specs = [spec("a", 0, 0, 256), spec("b", 0, 255, 256), spec("c", 0, 600, 256), spec("d", 1, 856, 256)]
    assert join_ranges(specs, [0, 256, 512, 768]) == [
        (0, 0, 0, 256),
        (0, 255, 256, 256),
        (0, 600, 512, 256),
        (1, 856, 768, 256),
    ]


def test_empty_tensors_make_an_empty_range() -> None:
    assert join_ranges([spec("a", 0, 0, 0), spec("b", 0, 0, 256)], [0, 0]) == [(0, 0, 0, 256)]
    assert join_ranges([], []) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("size_bytes", [1, 2 * MIB, 64 * MIB, 64 * MIB + 1, 12_345_678_901, 24 * 1024 * MIB])
def test_shares_follow_each_other_and_are_alike(size_bytes: int, ranks: int) -> None:
    shares = split(range(size_bytes), ranks)
    assert len(shares) == ranks
    assert (shares[0].start, shares[-1].stop) == (0, size_bytes)
    for one, following in pairwise(shares):
        assert one.stop == following.start
        assert one.stop % ALLOCATION_BYTES == 0 or one.stop == size_bytes
    assert max(map(len, shares)) < size_bytes / ranks + ALLOCATION_BYTES


def test_a_share_is_split_into_parts_in_the_same_way() -> None:
    assert split(range(4 * MIB, 15 * MIB), 4) == [
        range(4 * MIB, 8 * MIB),
        range(8 * MIB, 12 * MIB),
        range(12 * MIB, 15 * MIB),
        range(15 * MIB, 15 * MIB),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_upload_every_byte_once(blocks: list[torch.Tensor], seed: int, ranks: int) -> None:
    specs = checkpoint(seed)
    offsets, total = place([one.extent_bytes for one in specs])
    copy, times = torch.zeros(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    for share in split(range(total), ranks):
        for block, start, to, nbytes in clip_ranges(join_ranges(specs, offsets), share):
            assert share.start <= to < to + nbytes <= share.stop
            copy[to : to + nbytes] = blocks[block][start : start + nbytes]
            times[to : to + nbytes] += 1
    for one, offset in zip(specs, offsets, strict=True):
        end = one.offset_bytes + one.extent_bytes
        assert torch.equal(copy[offset : offset + one.extent_bytes], blocks[one.block][one.offset_bytes : end])
    assert int(times.max()) == 1
    assert int(times.sum(dtype=torch.int64)) == sum(one.extent_bytes for one in specs)  # and nothing in between


def test_a_range_is_clipped_where_a_share_ends() -> None:
    ranges = [CopyRange(0, 8, 0, 100), CopyRange(1, 50, 256, 1000), CopyRange(1, 2000, 1280, 5)]
    assert clip_ranges(ranges, range(300)) == [(0, 8, 0, 100), (1, 50, 256, 44)]
    assert clip_ranges(ranges, range(300, 1256)) == [(1, 94, 300, 956)]
    assert clip_ranges(ranges, range(1256, 1285)) == [(1, 2000, 1280, 5)]
    assert clip_ranges(ranges, range(110, 256)) == []
