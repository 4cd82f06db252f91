"""Blocks of device memory: exported once, reused, retired when they are too small, and all freed."""

import pytest

torch = pytest.importorskip("torch")

from xditd.client import device_blocks  # noqa: E402
from xditd.client.device_blocks import DevicePool  # noqa: E402
from xditd.ipc.errors import Internal  # noqa: E402
from xditd.ipc.tensors import IoTensor  # noqa: E402

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture
def pool():
    pool = DevicePool()
    yield pool
    pool.close()


def free_bytes():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


def test_a_block_is_reused_with_the_same_description(pool):
    block = pool.borrow(3 * MIB, 0)
    at = IoTensor(offset_bytes=4096, dtype="float32", shape=(2, 3))
    tensor = torch.randn(3, 2, device="cuda").T
    block.write(at, tensor)
    assert torch.equal(block.read(at, torch.device("cuda")), tensor)
    assert torch.equal(block.read(at, torch.device("cpu")), tensor.cpu())
    with pytest.raises(Internal, match="ends at byte"):
        block.read(IoTensor(offset_bytes=block.size_bytes, dtype="uint8", shape=(1,)), torch.device("cuda"))
    described = block.description
    block.wait()
    pool.give_back(block)
    assert pool.borrow(3 * MIB, 0) is block
    assert block.description == described
    other = pool.borrow(3 * MIB, 0)
    assert other.description.fingerprint != described.fingerprint
    pool.give_back(other)
    pool.give_back(block)


def test_blocks_that_are_too_small_are_retired_and_freed_by_the_caller(pool):
    small = pool.borrow(MIB, 0)
    pool.give_back(small)
    large = pool.borrow(64 * MIB, 0)
    assert large is not small
    retired = pool.take_retired()
    assert retired == [small]
    assert pool.take_retired() == []
    small.close()
    pool.retire(large)  # a job whose end is not known
    assert pool.take_retired() == [large]
    large.close()


def test_a_gpu_that_is_nearly_full_gives_none(pool, monkeypatch):
    monkeypatch.setattr(device_blocks, "KEPT_FREE_BYTES", free_bytes())
    assert pool.borrow(MIB, 0) is None


def test_all_memory_comes_back():
    torch.cuda.synchronize()
    pool = DevicePool()
    before = free_bytes()
    blocks = [pool.borrow(64 * MIB, 0) for _ in range(4)]
    assert free_bytes() <= before - 256 * MIB
    for block in blocks[:3]:
        pool.give_back(block)
    pool.close()
    pool.give_back(blocks[3])
    assert free_bytes() >= before - MIB
    assert pool.borrow(MIB, 0) is None
