"""Device memory shared by CUDA IPC handle. Needs a GPU and cuda-bindings."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from xditd.client.arenas import Arena
from xditd.client.lending import describe
from xditd.gpu_workers.weights.blocks import OpenBlocks
from xditd.ipc.errors import ForeignGpu, OutOfMemory, StaleSource, Unsupported
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.tensors import CopiedBytes, CudaIpcBlock, Tier
from xditd.ipc.transports import cuda_ipc
from xditd.ipc.transports.cuda_ipc import CudaMapping, DeviceArena, device_uuid
from xditd.ipc.transports.fingerprints import check_fingerprint

MIB = 2**20


def used_bytes() -> int:
    """Memory of the GPU in use by all processes."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return total - free


@pytest.fixture
def me() -> ProcessIdentity:
    return identify(os.getpid())


@pytest.fixture
def arena() -> Iterator[DeviceArena]:
    arena = DeviceArena(5 * MIB - 3, 0)
    arena.bytes.zero_()
    torch.cuda.synchronize()
    yield arena
    arena.close()


def plain(block: Any) -> Any:
    return msgspec.to_builtins(block)


def exported(other: Any, size_bytes: int, fill: int) -> tuple[CudaIpcBlock, ProcessIdentity]:
    """An arena of another process, filled with one byte."""
    block = msgspec.convert(other.ask("export_gpu", size_bytes=size_bytes, fill=fill), CudaIpcBlock)
    return block, msgspec.convert(other.identity, ProcessIdentity)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda_bindings_the_remedy_is_named() -> None:
    program = (
        "import sys; sys.modules['cuda.bindings'] = None; sys.modules['cuda'] = None\n"
        "from xditd.ipc.errors import Unsupported\n"
        "from xditd.ipc.transports import cuda_ipc\n"
        "for call in (cuda_ipc._runtime, cuda_ipc._driver):\n"
        "    try: call()\n"
        "    except Unsupported as error: print('pip install' in error.detail)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "True"]
    assert issubclass(cuda_ipc.NotExportable, Unsupported)


@pytest.mark.gpu
def test_sizes_are_whole_pages_of_two_mebibytes(arena: DeviceArena) -> None:
    assert arena.size_bytes == arena.bytes.numel() == 6 * MIB
    assert arena.block().size_bytes == 6 * MIB
    assert arena.block().device_uuid == device_uuid(0)
    assert len(arena.block().handle) == 64


@pytest.mark.gpu
def test_tensors_are_views(arena: DeviceArena) -> None:
    tensor = arena.tensor(512, torch.bfloat16, (3, 4))
    tensor.fill_(1.5)
    assert tensor.data_ptr() == arena.bytes.data_ptr() + 512
    assert bytes(arena.bytes[510:516].tolist()).hex() == "0000c03fc03f"
    assert arena.tensor(0, torch.float32, (0, 3)).shape == (0, 3)


@pytest.mark.gpu
def test_two_processes_write_to_the_same_memory(arena: DeviceArena, me: ProcessIdentity, other_process: Any) -> None:
    arena.bytes[100:104] = 7
    torch.cuda.synchronize()
    assert other_process.ask("map", block=plain(arena.block()), exporter=plain(me)) is None
    assert other_process.ask("read", offset=99, length=6) == "000707070700"
    arena.bytes[99] = 5
    torch.cuda.synchronize()
    assert other_process.ask("read", offset=99, length=2) == "0507"
    assert other_process.ask("write", offset=arena.size_bytes - 1, content="2a") is None
    assert arena.bytes[-1].item() == 0x2A
    assert other_process.ask("unmap") is None


@pytest.mark.gpu
def test_mapping_takes_no_second_copy(me: ProcessIdentity, other_process: Any) -> None:
    arena = DeviceArena(512 * MIB, 0)
    small = DeviceArena(1, 0)
    other_process.ask("map", block=plain(small.block()), exporter=plain(me))  # its context costs memory of its own
    other_process.ask("unmap")
    before = used_bytes()
    other_process.ask("map", block=plain(arena.block()), exporter=plain(me))
    assert abs(used_bytes() - before) <= 4 * MIB
    other_process.ask("unmap")
    small.close()
    arena.close()


@pytest.mark.gpu
def test_memory_comes_back(me: ProcessIdentity) -> None:
    DeviceArena(1, 0).close()
    before = used_bytes()
    for _ in range(20):
        arena = DeviceArena(256 * MIB, 0)
        arena.bytes[0] = 1
        assert used_bytes() >= before + 256 * MIB
        arena.close()
        arena.close()
    assert used_bytes() <= before + 2 * MIB


@pytest.mark.gpu
def test_another_processs_arena(spawn_other: Callable[[], Any], arena: DeviceArena) -> None:
    block, _ = exported(spawn_other(), 3 * MIB, 9)
    before = used_bytes()
    for _ in range(20):
        mapping = CudaMapping(block, 0)
        mapping.check_size()
        whole = mapping.bytes_tensor()
        assert whole.numel() == 4 * MIB
        assert int(whole.min()) == int(whole.max()) == 9
        check_fingerprint(whole, block.fingerprint, "x")
        del whole
        mapping.close()
        mapping.close()
    assert used_bytes() <= before + 4 * MIB


@pytest.mark.gpu
def test_more_bytes_than_are_mapped_are_refused(spawn_other: Callable[[], Any]) -> None:
    block, _ = exported(spawn_other(), 2 * MIB, 1)
    mapping = CudaMapping(msgspec.structs.replace(block, size_bytes=2**40), 0)
    with pytest.raises(StaleSource, match="are mapped"):
        mapping.check_size()
    mapping.close()


@pytest.mark.gpu
def test_stale_and_invented_handles_are_refused_and_leave_cuda_sound(
    arena: DeviceArena, spawn_other: Callable[[], Any]
) -> None:
    other = spawn_other()
    block, _ = exported(other, 2 * MIB, 1)
    other.kill()
    invented = [bytes(64), bytes(range(64)), b"\xff" * 64, arena.block().handle]  # the last one is our own
    for handle in [block.handle, *invented]:
        with pytest.raises(StaleSource, match="lend it again"):
            CudaMapping(msgspec.structs.replace(block, handle=handle), 0)
        assert torch.ones(3, device="cuda").sum().item() == 3  # no error is left behind for the next call


@pytest.mark.gpu
def test_bytes_outlive_the_process_that_made_them_while_they_are_mapped(spawn_other: Callable[[], Any]) -> None:
    other = spawn_other()
    block, _ = exported(other, 2 * MIB, 77)
    mapping = CudaMapping(block, 0)
    other.kill()
    assert int(mapping.bytes_tensor().min()) == 77
    mapping.close()


@pytest.mark.gpu
def test_no_room_on_the_gpu() -> None:
    before = used_bytes()
    with pytest.raises(OutOfMemory, match="cudaMalloc of"):
        DeviceArena(2**44, 0)
    with pytest.raises(OutOfMemory):
        Arena({"a": (torch.float32, (2**40,))}, "cuda")
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert used_bytes() <= before + 2 * MIB


@pytest.mark.gpu
def test_two_components_in_one_block_are_one_mapping(spawn_other: Callable[[], Any]) -> None:
    """A handle opens once in a process."""
    block, owner = exported(spawn_other(), 4 * MIB, 3)
    blocks = OpenBlocks(torch.device("cuda", 0), device_uuid(0))
    first, second = blocks.acquire(block, owner), blocks.acquire(block, owner)
    assert first is second
    assert (len(blocks), first.users) == (1, 2)
    with pytest.raises(StaleSource, match="are mapped"):
        blocks.acquire(msgspec.structs.replace(block, size_bytes=2**40), owner)
    blocks.release(first)
    assert int(second.bytes.max()) == 3
    blocks.release(second)
    assert len(blocks) == 0
    blocks.release(blocks.acquire(block, owner))  # and it opens again


@pytest.mark.gpu
def test_a_wrong_size_leaves_no_mapping_behind(spawn_other: Callable[[], Any]) -> None:
    block, owner = exported(spawn_other(), 4 * MIB, 3)
    blocks = OpenBlocks(torch.device("cuda", 0), device_uuid(0))
    with pytest.raises(StaleSource):
        blocks.acquire(msgspec.structs.replace(block, size_bytes=2**40), owner)
    other_bytes = msgspec.structs.replace(block.fingerprint, digest=bytes(16))
    with pytest.raises(StaleSource):
        blocks.acquire(msgspec.structs.replace(block, fingerprint=other_bytes), owner)
    assert len(blocks) == 0
    blocks.release(blocks.acquire(block, owner))  # which a handle that is still open would not allow


@pytest.mark.gpu
def test_a_foreign_gpu_is_refused_by_name(arena: DeviceArena, me: ProcessIdentity) -> None:
    elsewhere = msgspec.structs.replace(arena.block(), device_uuid="GPU-of-somebody-else")
    blocks = OpenBlocks(torch.device("cuda", 0), device_uuid(0))
    with pytest.raises(ForeignGpu, match="GPU-of-somebody-else"):
        blocks.acquire(elsewhere, me)


@pytest.mark.gpu
def test_torchs_own_segments_are_lent_as_they_are(me: ProcessIdentity, other_process: Any) -> None:
    state = {f"decoder.{number}": torch.full((50_000,), number, device="cuda") for number in range(30)}
    state["decoder.turned"] = torch.arange(6.0, device="cuda").view(2, 3).T
    state["decoder.expanded"] = torch.tensor([4.0], device="cuda").expand(5, 9)
    offer = describe(state)
    assert offer.manifest.tiers == (Tier.CUDA_IPC,)
    assert offer.copied == CopiedBytes()
    assert offer.manifest.faults() == []
    segments = {cuda_ipc.segment_of(tensor) for tensor in state.values()}
    assert len(offer.manifest.blocks) == len(segments)
    assert sorted(block.size_bytes for block in offer.manifest.blocks) == sorted(size for _, size in segments)
    spec = next(spec for spec in offer.manifest.tensors if spec.name == "decoder.17")
    block = offer.manifest.blocks[spec.block]
    assert other_process.ask("map", block=plain(block), exporter=plain(me)) is None
    assert other_process.ask("read", offset=spec.offset_bytes, length=16) == (17).to_bytes(8, "little").hex() * 2
    state["decoder.17"].fill_(18)
    torch.cuda.synchronize()
    assert other_process.ask("read", offset=spec.offset_bytes, length=8) == (18).to_bytes(8, "little").hex()
    assert other_process.ask("unmap") is None
    offer.close()


@pytest.mark.gpu
def test_an_arena_on_the_gpu_is_one_block_and_no_copy(me: ProcessIdentity, other_process: Any) -> None:
    source = {"decoder.a": torch.randn(300, 40), "decoder.b": torch.randn(7, device="cuda").bfloat16()}
    arena = Arena.copy_of(source, "cuda")
    assert arena.copied == CopiedBytes(host_to_device=48_000, device_to_device=14)
    offer = describe(arena.tensors)
    assert len(offer.manifest.blocks) == 1
    assert offer.copied == CopiedBytes()
    arena.tensors["decoder.a"].fill_(1.0)
    torch.cuda.synchronize()
    spec = offer.manifest.tensors[0]
    other_process.ask("map", block=plain(offer.manifest.blocks[0]), exporter=plain(me))
    assert other_process.ask("read", offset=spec.offset_bytes, length=8) == "0000803f0000803f"
    other_process.ask("unmap")
    offer.close()
    arena.close()


@pytest.mark.gpu
def test_a_path_is_loaded_once_to_the_gpu(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"decoder.a": torch.randn(100, 3), "decoder.b": torch.randint(0, 9, (50,)), "decoder.none": torch.zeros(0)}
    save_file(state, tmp_path / "x.safetensors")
    torch.ones(1, device="cuda")
    gc.collect()
    before = used_bytes()
    offer = describe(tmp_path / "x.safetensors", device="cuda")
    assert offer.manifest.tiers == (Tier.CUDA_IPC,)
    assert offer.copied.host_to_device == 1200 + 400
    assert offer.copied.total == offer.copied.host_to_device
    offer.close()
    assert used_bytes() <= before + 2 * MIB


@pytest.mark.gpu
def test_cpu_and_gpu_tensors_mix() -> None:
    offer = describe({"decoder.a": torch.ones(9), "decoder.b": torch.ones(9, device="cuda")})
    assert offer.manifest.tiers == (Tier.CUDA_IPC, Tier.HOST_SHM)
    assert offer.copied == CopiedBytes(host_to_host=36)
    offer.close()


ASYNC_POOL = """
import json, os, sys, torch
from xditd.client.lending import describe
from xditd.ipc.tensors import ComponentKind
assert torch.cuda.get_allocator_backend() == sys.argv[1], torch.cuda.get_allocator_backend()
state = {"decoder.a": torch.full((1000,), 3.0, device="cuda"), "decoder.b": torch.ones(7, device="cuda")}
offer = describe(state)
print(json.dumps([offer.copied.device_to_device, len(offer.manifest.blocks), *offer.tier_notes]))
offer.close()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("setting", "backend"),
    [("backend:cudaMallocAsync", "cudaMallocAsync"), ("expandable_segments:True", "native")],
)
def test_pools_that_cannot_be_exported_are_copied_once_and_say_so(setting: str, backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASYNC_POOL, backend],
        env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    copied, blocks, *notes = msgspec.json.decode(done.stdout)
    assert (copied, blocks) == (4028, 1)
    assert "cannot export" in notes[0]


@pytest.mark.gpu
def test_threads_other_than_the_first_may_lend() -> None:
    """A new thread has no current CUDA context until it makes one current."""
    from concurrent.futures import ThreadPoolExecutor

    state = {"decoder.a": torch.ones(100_000, device="cuda")}

    def lend() -> int:
        offer = describe(state)
        copied = offer.copied.total
        offer.close()
        return copied

    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(lend) for _ in range(8)]] == [0] * 8
