"""Views of raw bytes equal torch's slices, and descriptions without a valid view are refused."""

from __future__ import annotations

import pytest
import torch

from xditd.ipc.errors import BadRequest, UnsupportedDtype
from xditd.ipc.field_types import ITEM_BYTES
from xditd.ipc.tensors import TensorSpec
from xditd.ipc.transports.tensor_views import ALIGNMENT_BYTES, BlockViews, align, dtype_name, place, torch_dtype


@pytest.fixture
def block() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 255, (4099,), dtype=torch.uint8, generator=generator)  # no multiple of any element


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
def test_dtypes_by_name(name: str) -> None:
    assert dtype_name(torch_dtype(name)) == name
    assert torch_dtype(name).itemsize == ITEM_BYTES[name]


@pytest.mark.parametrize("dtype", [torch.complex32, torch.uint16, torch.float8_e4m3fnuz, torch.qint8])
def test_dtypes_that_do_not_cross(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedDtype, match=str(dtype).removeprefix("torch.")):
        dtype_name(dtype)


@pytest.mark.parametrize("name", ["Tensor", "nothing_like_it", "__name__"])
def test_names_that_are_no_dtypes(name: str) -> None:
    with pytest.raises(UnsupportedDtype, match=name):
        torch_dtype(name)


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
def test_contiguous_views_are_torchs_own_slices(block: torch.Tensor, name: str) -> None:
    dtype = torch_dtype(name)
    found = BlockViews(block).view(TensorSpec("a", name, (3, 5), 0, 64))  # type: ignore[arg-type]
    expected = block[64 : 64 + 15 * dtype.itemsize].view(dtype).view(3, 5)
    assert found.dtype == dtype
    assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert found.data_ptr() == block.data_ptr() + 64


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((4, 6), (6, 1)),
        ((6, 4), (1, 6)),
        ((3, 2), (8, 3)),
        ((5, 7), (0, 1)),
        ((2, 3, 4), (1, 2, 6)),
        ((), ()),
        ((1,), (9,)),
    ],
)
def test_strided_views_are_torchs_own(block: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    views = BlockViews(block)
    for offset in (0, 128):
        found = views.view(TensorSpec("a", "int16", shape, 0, offset, stride))
        expected = block[:4098].view(torch.int16).as_strided(shape, stride, offset // 2)
        assert torch.equal(found, expected)
        assert found.data_ptr() == block.data_ptr() + offset


def test_a_view_shares_the_memory(block: torch.Tensor) -> None:
    view = BlockViews(block).view(TensorSpec("a", "uint8", (4,), 0, 10))
    block[10] = 77
    assert view[0] == 77


def test_a_block_that_is_itself_a_slice(block: torch.Tensor) -> None:
    inner = block[256:]
    found = BlockViews(inner).view(TensorSpec("a", "float32", (4,), 0, 8))
    assert found.data_ptr() == inner.data_ptr() + 8


def test_another_offset_than_described(block: torch.Tensor) -> None:
    found = BlockViews(block).view(TensorSpec("a", "uint8", (4,), 0, 10), 20)
    assert torch.equal(found, block[20:24])


def test_empty_tensors(block: torch.Tensor) -> None:
    views = BlockViews(block)
    assert views.view(TensorSpec("a", "float32", (0, 7), 0, 4096)).shape == (0, 7)
    assert views.view(TensorSpec("a", "float32", (7, 0), 0, 0, (1, 5))).shape == (7, 0)


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 2), ("int64", 4), ("bfloat16", 1)])
def test_a_start_between_two_elements_is_refused(block: torch.Tensor, dtype: str, offset: int) -> None:
    with pytest.raises(BadRequest, match=f"byte {offset}"):
        BlockViews(block).view(TensorSpec("a", dtype, (1,), 0, offset))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((0, 2**40, 2**40), None), ((2**40, 2**40), (0, 0)), ((2**40, 0, 2**40, 2**40), (1, 1, 1, 1))],
)
def test_shapes_beyond_64_bits_are_refused(
    block: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None
) -> None:
    with pytest.raises(BadRequest, match="tensor a"):
        BlockViews(block).view(TensorSpec("a", "uint8", shape, 0, 0, stride))


def test_alignment() -> None:
    assert [align(offset) for offset in (0, 1, 255, 256, 257)] == [0, 256, 256, 256, 512]
    assert align(3, 2) == 4


def test_place_aligns_and_never_overlaps() -> None:
    sizes = [1, 0, 256, 257, 5, 0]
    offsets, total = place(sizes)
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in offsets)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, offsets[1:], strict=False))
    assert total == max(ends)
    assert place([]) == ([], 0)
