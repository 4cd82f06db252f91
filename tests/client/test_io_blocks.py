"""Blocks for the tensors of jobs: aligned, reused, not shared, and all freed."""

import pytest

torch = pytest.importorskip("torch")

from xditd.client.io_blocks import IoPool  # noqa: E402
from xditd.client.io_places import IoPlaces  # noqa: E402


@pytest.fixture
def pool():
    pool = IoPool()
    yield pool
    pool.close()


def test_tensors_are_aligned_and_outputs_lie_beyond_the_fingerprint():
    layout = IoPlaces()
    first = layout.add_input(torch.zeros(3))
    second = layout.add_input(torch.zeros(5, dtype=torch.bfloat16))
    output = layout.add_output(torch.float32, (2, 2))
    assert (first.offset_bytes, second.offset_bytes, output.offset_bytes) == (0, 256, 4096)
    assert layout.size_bytes == 4096 + 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_survive_the_round_trip(pool, dtype):
    tensor = torch.randn(2, 3, 5).to(dtype)
    layout = IoPlaces()
    spec = layout.add_input(tensor)
    block = pool.borrow(layout.size_bytes)
    block.write(spec, tensor)
    back = block.read(spec, torch.device("cpu"))
    block.write(spec, torch.zeros_like(tensor))
    assert torch.equal(back, tensor)  # a copy: later writes do not change it
    pool.give_back(block)


def test_a_transposed_view_is_written_in_logical_order(pool):
    tensor = torch.arange(6.0).reshape(2, 3).T
    layout = IoPlaces()
    spec = layout.add_input(tensor)
    block = pool.borrow(layout.size_bytes)
    block.write(spec, tensor)
    assert torch.equal(block.read(spec, torch.device("cpu")), tensor)
    pool.give_back(block)


def test_values_that_are_negated_or_strided_or_empty_arrive(pool):
    base = torch.arange(6.0).reshape(2, 3)
    for tensor in (torch._neg_view(base), base[:, ::2], base.to(torch.complex64).imag, base.requires_grad_()):
        layout = IoPlaces()
        spec = layout.add_input(tensor)
        block = pool.borrow(layout.size_bytes)
        block.write(spec, tensor)
        assert torch.equal(block.read(spec, torch.device("cpu")), tensor)
        pool.give_back(block)


def test_blocks_in_use_are_distinct_and_reused(pool):
    first, second = pool.borrow(10), pool.borrow(10)
    assert first.describe().inode != second.describe().inode
    pool.give_back(first)
    assert pool.borrow(3_000).describe().inode == first.describe().inode
    pool.give_back(second)


def test_sizes_are_powers_of_two(pool):
    block = pool.borrow(5 * 2**20)
    assert block.describe().size_bytes == 8 * 2**20
    pool.give_back(block)


def test_blocks_of_videos_are_no_larger_than_needed_and_one_stays(pool, open_memfds):
    frames = 81 * 3 * 720 * 1280 * 4
    before = open_memfds()
    first, second = pool.borrow(frames), pool.borrow(2 * frames)
    assert frames <= first.describe().size_bytes < frames + 64 * 2**20
    assert 2 * frames <= second.describe().size_bytes < 2 * frames + 64 * 2**20
    kept = second.describe().inode
    small = pool.borrow(10)
    for block in (small, first, second):
        pool.give_back(block)
    assert open_memfds() - before == 2  # the small one, and the last large one
    assert pool.borrow(2 * frames - 1000).describe().inode == kept


def test_large_tensors_survive_the_round_trip(pool):
    tensor = torch.randn(17 * 2**20)  # 68 MiB
    layout = IoPlaces()
    spec = layout.add_input(tensor)
    block = pool.borrow(layout.size_bytes)
    block.write(spec, tensor)
    assert torch.equal(block.read(spec, torch.device("cpu")), tensor)
    pool.give_back(block)


def test_closing_frees_every_block(open_memfds):
    before = open_memfds()
    pool = IoPool()
    idle, lent = pool.borrow(1), pool.borrow(1)
    pool.give_back(idle)
    pool.close()
    assert open_memfds() == before + 1
    pool.give_back(lent)
    assert open_memfds() == before
