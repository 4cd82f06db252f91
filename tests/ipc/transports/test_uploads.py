"""Host memory onto a GPU through pinned buffers: every byte arrives, in stream order; nothing is read afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client.arenas import Arena
from xditd.ipc.transports.uploads import can_upload, upload

gpu = pytest.mark.gpu
MIB = 2**20


@pytest.fixture
def sources() -> list[torch.Tensor]:
    """More than one buffer each, less than one, odd sizes, one byte, nothing; the odd ones at odd addresses."""
    generator = torch.Generator().manual_seed(1)
    sizes = [40 * MIB + 3, 7, 16 * MIB, 1, 0, 33 * MIB, 5]
    whole = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=generator)
    return list(whole.split(sizes))


@gpu
def test_every_byte_arrives(sources):
    targets = [torch.full_like(source, 7, device="cuda:0") for source in sources]
    assert list(upload(list(zip(sources, targets, strict=True)))) == list(range(len(sources)))
    assert all(torch.equal(target.cpu(), source) for source, target in zip(sources, targets, strict=True))


@gpu
def test_memory_made_in_inference_mode_is_filled(sources):
    with torch.inference_mode():
        targets = [torch.zeros_like(source, device="cuda:0") for source in sources]
        list(upload(list(zip(sources, targets, strict=True))))
    assert all(torch.equal(target.cpu(), source) for source, target in zip(sources, targets, strict=True))


@gpu
def test_work_issued_after_a_pair_sees_it(sources):
    targets = [torch.zeros_like(source, device="cuda:0") for source in sources]
    sums = {}
    for number in upload(list(zip(sources, targets, strict=True))):
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
    (_,) = upload([(source, target)])
    assert int(target.max()) == int(target.min()) == 1


@gpu
def test_an_iterator_that_is_left_early_reads_no_more():
    source = torch.ones(200 * MIB, dtype=torch.uint8)
    first, second = torch.zeros(1, dtype=torch.uint8), source
    pairs = [(each, torch.zeros_like(each, device="cuda:0")) for each in (first, second)]
    copies = upload(pairs)
    assert next(copies) == 0
    copies.close()
    left = pairs[1][1].clone()
    source.fill_(2)
    torch.cuda.synchronize()
    assert torch.equal(pairs[1][1], left)


@gpu
def test_an_arena_is_filled_from_a_mapped_file(tmp_path: Path):
    tensors = {"a": torch.randn(3000, 3001).bfloat16(), "b": torch.randn(5), "c": torch.randn(64, 7).t().contiguous()}
    save_file(tensors, tmp_path / "x.safetensors")
    arena = Arena.copy_of(load_file(tmp_path / "x.safetensors"), "cuda:0")
    assert all(torch.equal(arena.tensors[name].cpu(), tensor) for name, tensor in tensors.items())
    assert arena.copied.host_to_device == sum(tensor.nbytes for tensor in tensors.values())
    arena.close()


def test_nothing_to_upload():
    assert list(upload([])) == []


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
