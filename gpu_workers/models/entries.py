"""The description of a checkpoint: its tensors, and the module parameters that each of them fills.

A family lists an :class:`Entry` for each tensor: its shape, and the parameters that its rows fill, in order. From them
``resolution.py`` makes the key map, where every parameter is a *view* of one tensor (:class:`Slice`), and proves that
each element is used once and each parameter filled once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.packed import PackedWeight

Shape = tuple[int, ...]

Bindings = dict[str, torch.Tensor | PackedTensor]
"""Parameters by name, plain or packed, as views of lent tensors."""


def tensors_in(bindings: Mapping[str, torch.Tensor | PackedTensor]) -> list[torch.Tensor]:
    """Return all tensors of bindings, those of packed weights one by one."""
    return [part for each in bindings.values() for part in (each.tensors if isinstance(each, PackedTensor) else [each])]


TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""The dtypes of plain weights that can be run. Others are packed, with a format that says what they mean."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its bytes; ``dtype`` is torch's own name, such as ``bfloat16``.

    A ``packed`` weight has its logical shape.
    """

    dtype: str
    shape: Shape
    packed: PackedWeight | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class Entry:
    """One source tensor under its canonical name, and the ``(parameter, rows)`` that split its first dimension.

    ``view`` is the shape of the only parameter, where that differs: a 1x1 convolution as a linear layer, or six vectors
    as the rows of a matrix.
    """

    source: str
    shape: Shape
    targets: tuple[tuple[str, int], ...]
    view: Shape | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A parameter as a view: rows ``start`` to ``stop`` of ``source``, viewed as ``shape`` unless that is ``None``."""

    source: str
    start: int
    stop: int
    shape: Shape | None = None


def tensor_entry(source: str, shape: Shape, *targets: str, rows: tuple[int, ...] = ()) -> Entry:
    """Describe a tensor whose rows fill ``targets`` in order, with equal parts or with ``rows`` each.

    Without targets it fills the parameter of its own name.
    """
    targets = targets or (source,)
    return Entry(source, shape, tuple(zip(targets, rows or (shape[0] // len(targets),) * len(targets), strict=True)))


def layer_entries(source: str, shape: Shape, *targets: str, rows: tuple[int, ...] = ()) -> Iterator[Entry]:
    """Describe the weight (of ``shape``) and the bias of a layer, as :func:`tensor_entry` does, by layer names."""
    for part, part_shape in (("weight", shape), ("bias", shape[:1])):
        yield tensor_entry(f"{source}.{part}", part_shape, *(f"{target}.{part}" for target in targets), rows=rows)


def half_precision(tensors: Iterable[TensorInfo]) -> torch.dtype | None:
    """Return the half precision of most elements; ``None`` if no tensor is in half precision."""
    floats = ((TORCH_DTYPES[info.dtype], info.shape) for info in tensors if info.dtype in TORCH_DTYPES)
    halves = [(dtype, shape) for dtype, shape in floats if dtype in HALF_DTYPES]
    return dtype_of_most(halves) if halves else None


def dtype_of_most(tensors: Iterable[tuple[torch.dtype, Shape]]) -> torch.dtype:
    """Return the dtype of most elements."""
    elements: Counter[torch.dtype] = Counter()
    for dtype, shape in tensors:
        elements[dtype] += math.prod(shape)
    return elements.most_common(1)[0][0]
