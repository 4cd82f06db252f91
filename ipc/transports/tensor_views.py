"""Tensors as views of a block's bytes: dtype names, alignment, offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, UnsupportedDtype
from xditd.ipc.field_types import ITEM_BYTES, DType
from xditd.ipc.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES: Final = 256
"""Alignment of tensors in xditd's own blocks, as ``cudaMalloc`` guarantees."""

VIEW_ALIGNMENT_BYTES: Final = 64
"""Least alignment at which lent host memory is viewed: that of torch's CPU allocator.

A tensor of a file with less alignment is copied: vectorized kernels split loops by address, and 8-byte alignment was
seen to change results in the last bits.
"""

ALLOCATION_BYTES: Final = 2 * 2**20
"""Granularity of arenas: CUDA IPC exposes whole 2 MiB pages, which must contain nothing else."""


def align(offset_bytes: int, to_bytes: int = ALIGNMENT_BYTES) -> int:
    """Round an offset up to a multiple of ``to_bytes``."""
    return -(-offset_bytes // to_bytes) * to_bytes


def place(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Place tensors of these sizes one after the other, aligned; return their offsets and the total size."""
    offsets = []
    end = 0
    for size in sizes_bytes:
        start = align(end)
        offsets.append(start)
        end = start + size
    return offsets, end


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of this name."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedDtype(f"dtype {name!r}: torch {torch.__version__} has no such dtype")
    return dtype


def dtype_name(dtype: torch.dtype, what: str = "") -> DType:
    """Return the name of torch's dtype in messages; errors name the tensor ``what``.

    Raises:
        UnsupportedDtype: it cannot be sent (quantized, packed).
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise UnsupportedDtype(
            f"{what + ': ' if what else ''}dtype {name} cannot be sent: convert it to one of "
            f"{', '.join(sorted(ITEM_BYTES))}"
        )
    return name  # type: ignore[return-value]  # membership was checked against the Literal's own table


class BlockViews:
    """Create tensors that view one block's bytes (1-D uint8), which the block owns, without copying.

    One ``as_strided`` for each tensor: a large transformer has 780, and a lend takes milliseconds.
    """

    def __init__(self, block: torch.Tensor) -> None:
        self._block = block
        self._typed: dict[str, torch.Tensor] = {}

    def view(self, spec: TensorSpec, offset_bytes: int | None = None) -> torch.Tensor:
        """View one tensor at its offset, or at ``offset_bytes``. The caller has checked that it is inside the block.

        Raises:
            BadRequest: its offset is not a multiple of its element size, or its shape overflows torch's counts.
        """
        if spec.span > limits.MAX_BYTES:
            raise BadRequest(f"tensor {spec.name} has the shape {list(spec.shape)}, which is too large for any memory")
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


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of a tensor from the outermost to the innermost in memory; ``None`` if in order.

    Some kernels round differently for another order, such as channels last, which they see by the strides also where
    dimensions of one element make no difference in memory. A tensor with repeated elements (expanded) counts as in
    order.
    """
    if (tensor.is_contiguous() and tensor.ndim < 4) or any(  # torch has its memory formats from 4 dimensions on
        not step and side > 1 for side, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return None
    steps = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda dimension: (-steps[dimension], dimension)))
    return None if order == tuple(range(tensor.ndim)) else order


def inverse_order(order: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that undoes ``tensor.permute(order)``."""
    found = [0] * len(order)
    for position, dimension in enumerate(order):
        found[dimension] = position
    return tuple(found)
