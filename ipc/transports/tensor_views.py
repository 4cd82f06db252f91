"""How tensors lie in a block: dtypes by name, alignment, and views into raw bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, UnsupportedDtype
from xditd.ipc.tensors import ITEM_BYTES, DType, TensorSpec

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES: Final = 256
"""Where tensors start in blocks that we lay out; what ``cudaMalloc`` guarantees."""

VIEW_ALIGNMENT_BYTES: Final = 64
"""Least alignment at which lent host memory is viewed, as torch's CPU allocator gives.

A slice of a file that starts elsewhere is copied: vectorised kernels split loops by address, and
8-byte alignment was seen to change results in the last bits.
"""

ALLOCATION_BYTES: Final = 2 * 2**20
"""Granularity of arenas: CUDA IPC exposes whole 2 MiB pages, so nothing else may share them."""


def align(offset_bytes: int, to_bytes: int = ALIGNMENT_BYTES) -> int:
    """Round an offset up."""
    return -(-offset_bytes // to_bytes) * to_bytes


def place(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Lay tensors of these sizes out one after the other; return their offsets and the total."""
    offsets = []
    end = 0
    for size in sizes_bytes:
        start = align(end)
        offsets.append(start)
        end = start + size
    return offsets, end


def torch_dtype(name: str) -> torch.dtype:
    """Translate a dtype's name to torch's object."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedDtype(f"dtype {name!r}: torch {torch.__version__} has no such dtype")
    return dtype


def dtype_name(dtype: torch.dtype, what: str = "") -> DType:
    """Translate torch's dtype to its name on the wire; ``what`` is the tensor that a refusal names.

    Raises:
        UnsupportedDtype: the wire does not carry it (complex, quantised, packed).
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise UnsupportedDtype(
            f"{what + ': ' if what else ''}dtype {name} cannot cross: convert it to one of "
            f"{', '.join(sorted(ITEM_BYTES))}"
        )
    return name  # type: ignore[return-value]  # membership was checked against the Literal's own table


class BlockViews:
    """Tensors as views of one block's bytes (1-D uint8). Nothing is copied; the block keeps the memory.

    One ``as_strided`` a tensor: a large transformer has 780 of them, and lending it should take milliseconds.
    """

    def __init__(self, block: torch.Tensor) -> None:
        self._block = block
        self._typed: dict[str, torch.Tensor] = {}

    def view(self, spec: TensorSpec, offset_bytes: int | None = None) -> torch.Tensor:
        """View one tensor at its offset, or at another one. The caller has checked that it lies inside the block.

        Raises:
            BadRequest: it starts between two elements, or has a shape that torch cannot count in.
        """
        if spec.span > limits.MAX_BYTES:
            raise BadRequest(f"tensor {spec.name} has the shape {list(spec.shape)}, which no memory holds")
        start = spec.offset_bytes if offset_bytes is None else offset_bytes
        item = ITEM_BYTES[spec.dtype]
        if start % item:
            raise BadRequest(f"tensor {spec.name} starts at byte {start}, not a multiple of its {item}-byte elements")
        typed = self._typed.get(spec.dtype)
        if typed is None:
            whole = self._block.numel() // item * item
            typed = self._typed[spec.dtype] = self._block[:whole].view(torch_dtype(spec.dtype))
        first = typed.storage_offset() + start // item
        return typed.as_strided(spec.shape, spec.stride or _contiguous(spec.shape), first)


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides = []
    step = 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return strides[::-1]
