"""Clients' blocks of device memory: what a message may describe, copies in both directions, and mappings that end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from xditd.gpu_workers.parallel import client_blocks
from xditd.gpu_workers.parallel.client_blocks import ClientBlocks
from xditd.gpu_workers.parallel.gpu_copies import GpuCopies
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import BadRequest, ForeignGpu, StaleSource
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.tensors import CudaIpcBlock, Fingerprint, IoTensor
from xditd.ipc.transports.cuda_ipc import device_uuid

MIB = 2**20
ALICE = ProcessIdentity(pid=1, start_ticks=1)
HANDLE = bytes(range(64))


def rank_on(device: torch.device, uuid: str) -> ClientBlocks:
    return ClientBlocks(GpuCopies(ParallelLayout(0, Degrees(), device, "none"), (uuid,)))


def described(**changed: Any) -> CudaIpcBlock:
    block = CudaIpcBlock(
        device_uuid="GPU-1",
        handle=HANDLE,
        size_bytes=2 * MIB,
        fingerprint=Fingerprint(length_bytes=4096, digest=bytes(16)),
    )
    return msgspec.structs.replace(block, **changed)


def sample(offset_bytes: int, length_bytes: int) -> Fingerprint:
    return Fingerprint(offset_bytes=offset_bytes, length_bytes=length_bytes, digest=bytes(16))


def test_workers_on_the_cpu_refuse_device_memory() -> None:
    blocks = rank_on(torch.device("cpu"), "")
    with pytest.raises(ForeignGpu, match=r"on GPU GPU-1: the workers' GPUs are none, they run on the CPU; send"):
        blocks.open(described(), ALICE, 0)
    assert len(blocks) == 0


def test_memory_of_another_gpu_is_refused_by_both_names() -> None:
    with pytest.raises(ForeignGpu, match=r"on GPU GPU-2: the workers' GPUs are GPU-1; send its tensors through host"):
        rank_on(torch.device("cpu"), "GPU-1").open(described(device_uuid="GPU-2"), ALICE, 0)


@pytest.mark.parametrize(
    ("changed", "end_bytes", "match"),
    [
        ({"fingerprint": sample(1, 4096)}, 0, "fingerprint is of the bytes 1 to 4097 of 2097152, use the first 4096"),
        ({"fingerprint": sample(0, 0)}, 0, "fingerprint is of the bytes 0 to 0"),
        ({"size_bytes": 4095}, 0, "fingerprint is of the bytes 0 to 4096 of 4095"),
        ({}, 2 * MIB + 1, "its inputs end at byte 2097153 of 2097152"),
    ],
)
def test_impossible_descriptions_are_refused_before_anything_is_mapped(
    changed: dict[str, Any], end_bytes: int, match: str
) -> None:
    with pytest.raises(BadRequest, match=match):
        rank_on(torch.device("cpu"), "GPU-1").open(described(**changed), ALICE, end_bytes)


def test_dropping_and_forgetting_what_is_not_mapped_is_no_error() -> None:
    blocks = rank_on(torch.device("cpu"), "GPU-1")
    blocks.unmap(ALICE, [bytes(16)])
    blocks.forget(ALICE)
    blocks.close()


@pytest.fixture
def blocks() -> Iterator[ClientBlocks]:
    blocks = rank_on(torch.device("cuda", 0), device_uuid(0))
    yield blocks
    blocks.close()


def exported(other: Any, size_bytes: int = 4 * MIB, fill: int = 7) -> CudaIpcBlock:
    return msgspec.convert(other.ask("export_gpu", size_bytes=size_bytes, fill=fill), CudaIpcBlock)


@pytest.mark.gpu
def test_inputs_are_copies_and_results_arrive(blocks: ClientBlocks, spawn_other: Callable[[], Any]) -> None:
    block = exported(spawn_other())
    opened = blocks.open(block, ALICE, block.size_bytes)
    at = IoTensor(offset_bytes=8192, dtype="bfloat16", shape=(3, 256))
    first = opened.read("x", at)
    torch.cuda.synchronize()
    assert first.dtype == torch.bfloat16
    assert set(first.view(torch.uint8).flatten().tolist()) == {7}
    first.zero_()  # a forward may write to its arguments: the client's memory does not change
    result = torch.randn(3, 256, device="cuda").bfloat16()
    again = opened.read("x", at)
    opened.write("out", at, result.T.contiguous().T)
    written = opened.read("out", at)
    torch.cuda.synchronize()
    assert set(again.view(torch.uint8).flatten().tolist()) == {7}
    assert torch.equal(written, result)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bool", "float8_e4m3fn", "complex64", "int64"])
def test_every_dtype_and_shape(blocks: ClientBlocks, spawn_other: Callable[[], Any], dtype: Any) -> None:
    opened = blocks.open(exported(spawn_other(), fill=1), ALICE, 4 * MIB)
    for shape in ((), (0, 3), (2, 5)):
        at = IoTensor(offset_bytes=4096, dtype=dtype, shape=shape)
        read = opened.read("x", at)
        opened.write("out", at, read)
        assert (read.shape, str(read.dtype)) == (shape, f"torch.{dtype}")


@pytest.mark.gpu
def test_tensors_outside_the_block_are_refused(blocks: ClientBlocks, spawn_other: Callable[[], Any]) -> None:
    opened = blocks.open(exported(spawn_other()), ALICE, 0)
    beyond = IoTensor(offset_bytes=4 * MIB - 1, dtype="uint8", shape=(2,))
    for use in (lambda: opened.read("x", beyond), lambda: opened.write("x", beyond, torch.zeros(2).byte().cuda())):
        with pytest.raises(BadRequest, match="x: ends at byte 4194305 of a block of device memory of 4194304"):
            use()


@pytest.mark.gpu
def test_false_blocks_are_refused_and_leave_nothing_mapped(
    blocks: ClientBlocks, spawn_other: Callable[[], Any]
) -> None:
    block = exported(spawn_other())
    foreign = msgspec.structs.replace(block, handle=HANDLE)
    longer = msgspec.structs.replace(block, size_bytes=64 * MIB)
    other_bytes = msgspec.structs.replace(block, fingerprint=sample(0, 4096))
    for false in (foreign, longer, other_bytes):
        with pytest.raises(StaleSource):
            blocks.open(false, ALICE, 0)
        assert len(blocks) == 0
    blocks.open(block, ALICE, 0)
    with pytest.raises(StaleSource, match="its fingerprint is that of another block of the same process"):
        blocks.open(msgspec.structs.replace(block, size_bytes=2 * MIB), ALICE, 0)
    assert len(blocks) == 1


@pytest.mark.gpu
def test_mappings_are_reused_dropped_forgotten_and_bounded(
    blocks: ClientBlocks, spawn_other: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_blocks, "MAX_MAPPED", 2)
    made = [exported(spawn_other(), fill=number) for number in range(3)]
    for block in (made[0], made[0], made[1]):
        blocks.open(block, ALICE, 0)
    assert len(blocks) == 2
    blocks.open(made[2], ALICE, 0)
    assert len(blocks) == 2
    blocks.unmap(ALICE, [made[2].fingerprint.digest])
    assert len(blocks) == 1
    blocks.forget(ProcessIdentity(pid=2, start_ticks=1))
    assert len(blocks) == 1
    blocks.forget(ALICE)
    assert len(blocks) == 0


@pytest.mark.gpu
def test_memory_of_a_client_that_was_killed_stays_readable_until_it_is_forgotten(
    blocks: ClientBlocks, spawn_other: Callable[[], Any]
) -> None:
    other = spawn_other()
    opened = blocks.open(exported(other, size_bytes=256 * MIB), ALICE, 0)
    other.kill()
    read = opened.read("x", IoTensor(offset_bytes=4096, dtype="uint8", shape=(MIB,)))
    torch.cuda.synchronize()
    assert int(read.max()) == int(read.min()) == 7
    before = torch.cuda.mem_get_info(0)[0]
    blocks.forget(ALICE)
    assert torch.cuda.mem_get_info(0)[0] >= before + 250 * MIB
