"""Manifests: sizes as torch counts them, and all inconsistencies listed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from xditd.ipc import limits
from xditd.ipc.field_types import ITEM_BYTES, DType
from xditd.ipc.tensors import (
    ComponentKind,
    CopiedBytes,
    CudaIpcBlock,
    FileBlock,
    Fingerprint,
    HostShmBlock,
    IoTensor,
    Manifest,
    TensorSpec,
    Tier,
    tier_of,
)

PRINT = Fingerprint(length_bytes=0, digest=bytes(16))
SHM = HostShmBlock(fd=3, inode=1, size_bytes=1000, fingerprint=PRINT)
CUDA = CudaIpcBlock(device_uuid="GPU-0", handle=bytes(64), size_bytes=1000, fingerprint=PRINT)
FILE = FileBlock(fd=3, path="/x", device=1, inode=1, mtime_ns=0, ctime_ns=0, size_bytes=1000, fingerprint=PRINT)


def manifest(*tensors: TensorSpec, blocks: Any = (SHM,)) -> Manifest:
    return Manifest(kind=ComponentKind.VAE, label="x", blocks=blocks, tensors=tensors)


def test_item_sizes_are_those_of_torch() -> None:
    assert set(ITEM_BYTES) == set(DType.__args__)  # type: ignore[attr-defined]
    assert {name: getattr(torch, name).itemsize for name in ITEM_BYTES} == ITEM_BYTES


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(5, 7),
        torch.zeros(5, 7).T,
        torch.zeros(10, 8)[::3, 1::2],
        torch.zeros(4, 1).expand(4, 6),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(()),
        torch.zeros(0, 5),
        torch.zeros(5, 0).T,
        torch.zeros(3, 4, dtype=torch.bfloat16)[:, 2],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}x{tensor.stride()}",
)
def test_extent_is_the_stretch_from_first_to_last_element(tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    strided = TensorSpec("a", dtype, tuple(tensor.shape), 0, 0, tuple(tensor.stride()))  # type: ignore[arg-type]
    # torch refuses a storage that is too small, so the smallest one that it takes is the extent.
    storage = torch.zeros(strided.extent_bytes, dtype=torch.uint8).view(tensor.dtype)
    storage.as_strided(tensor.shape, tensor.stride())
    if tensor.numel():
        with pytest.raises(RuntimeError, match="out of bounds"):
            storage[:-1].clone().as_strided(tensor.shape, tensor.stride())
    if tensor.is_contiguous():
        assert TensorSpec("a", dtype, tuple(tensor.shape), 0, 0).extent_bytes == tensor.nbytes  # type: ignore[arg-type]


def test_a_sound_manifest_has_no_faults() -> None:
    sound = manifest(
        TensorSpec("a", "float32", (250,), 0, 0),
        TensorSpec("shares bytes with a", "uint8", (1000,), 0, 0),
        TensorSpec("empty, at the very end", "float32", (0, 4), 0, 1000),
        TensorSpec("scalar", "float32", (), 0, 996),
        TensorSpec("strided", "float32", (2, 2), 0, 0, (100, 1)),
    )
    assert sound.faults() == []
    assert sound.tensor_bytes == 1000 + 1000 + 0 + 4 + 102 * 4


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ([("a", "uint8", (1,), 0, 0), ("a", "uint8", (1,), 0, 0)], "tensor a is listed twice"),
        ([("a", "uint8", (1,), 1, 0)], "tensor a is in block 1 of 1"),
        ([("a", "uint8", (2, 2), 0, 0, (1,))], "tensor a has 2 dimensions but 1 strides"),
        ([("a", "uint8", (), 0, 0, (1,))], "tensor a has 0 dimensions but 1 strides"),
        ([("a", "float32", (250,), 0, 1)], "tensor a ends at byte 1001 of block 0, which has 1000"),
        ([("a", "float32", (2, 2), 0, 0, (1000, 1))], "tensor a ends at byte 4008 of block 0"),
        ([("a", "uint8", (0,), 0, 1001)], "tensor a ends at byte 1001 of block 0"),
        ([("a", "uint8", (2**40,) * 8, 0, 0)], "tensor a"),
        ([("a", "uint8", (2**40, 2**40), 0, 0, (0, 0))], "tensor a"),  # a product that overflows 64 bits, in no memory
        ([("a", "uint8", (0, 2**40, 2**40), 0, 0)], "tensor a"),
    ],
)
def test_each_fault_is_named(tensors: list[tuple[Any, ...]], fault: str) -> None:
    found = manifest(*(TensorSpec(*fields) for fields in tensors)).faults()
    assert len(found) == 1
    assert fault in found[0]


def test_all_faults_are_reported_at_once() -> None:
    found = manifest(TensorSpec("a", "uint8", (1,), 9, 0), TensorSpec("b", "uint8", (9999,), 0, 0)).faults()
    assert [fault.split()[1] for fault in found] == ["a", "b"]


def test_wrong_strides_do_not_break_the_sizes() -> None:
    """Sizes are shown and summed for manifests that somebody else wrote."""
    assert manifest(TensorSpec("a", "uint8", (2, 2), 0, 0, (1,))).tensor_bytes == 2


def test_tiers() -> None:
    assert [tier_of(block) for block in (CUDA, SHM, FILE)] == [Tier.CUDA_IPC, Tier.HOST_SHM, Tier.FILE]
    one = TensorSpec("a", "uint8", (1,), 0, 0)
    assert manifest(one, blocks=(FILE, SHM, FILE, CUDA)).tiers == (Tier.CUDA_IPC, Tier.FILE, Tier.HOST_SHM)


def test_copied_bytes_add_up_by_kind() -> None:
    one = CopiedBytes(host_to_host=1, host_to_device=2, device_to_device=3, peer=4)
    two = CopiedBytes(host_to_host=10, host_to_device=20, device_to_device=30, peer=40)
    both = one + two
    expected = {name: getattr(one, name) + getattr(two, name) for name in CopiedBytes.__struct_fields__}
    assert msgspec.to_builtins(both) == expected
    assert (one.total, both.total, CopiedBytes().total) == (10, 110, 0)


def test_copied_bytes_stay_within_what_a_message_carries() -> None:
    """A huge count of one client must not make the status invalid."""
    most = CopiedBytes(host_to_host=limits.MAX_BYTES)
    assert msgspec.convert(msgspec.to_builtins(most + most), CopiedBytes) == most


def test_io_tensors_are_contiguous() -> None:
    assert IoTensor(offset_bytes=0, dtype="bfloat16", shape=(2, 3, 5)).size_bytes == 60
    assert IoTensor(offset_bytes=0, dtype="float64", shape=()).size_bytes == 8
    assert IoTensor(offset_bytes=0, dtype="float64", shape=(0, 2**40)).size_bytes == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", (-1,)),
        ("shape", (2**41,)),
        ("shape", (1,) * 9),
        ("offset_bytes", -1),
        ("offset_bytes", 2**46 + 1),
        ("block", -1),
        ("block", limits.MAX_BLOCKS),
        ("dtype", "complex32"),
        ("dtype", "__class__"),
        ("name", ""),
        ("name", "n" * 513),
        ("stride", (-1,)),
    ],
)
def test_values_outside_the_limits_are_not_built(field: str, value: Any) -> None:
    fields = {"name": "a", "dtype": "uint8", "shape": (1,), "block": 0, "offset_bytes": 0, "stride": (1,)}
    msgspec.convert(list(fields.values()), TensorSpec)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(list((fields | {field: value}).values()), TensorSpec)


@pytest.mark.parametrize("number", [0, 2**63, 2**64 - 1])
def test_inode_numbers_take_all_64_bits(number: int) -> None:
    """Overlay file systems, which containers use, put a layer's number into the highest bits."""
    for block in (SHM, FILE):
        plain = msgspec.to_builtins(msgspec.structs.replace(block, inode=number))
        assert msgspec.convert(plain, type(block)).inode == number
