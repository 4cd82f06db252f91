"""The description of a checkpoint: its tensors, and the module parameters that each of them fills.

A family lists an :class:`Entry` for each tensor: its shape, and the parameters that its rows fill, in order. From them
``resolution.py`` makes the key map, where every parameter is a *view* of one tensor (:class:`Slice`), and proves that
each element is used once and each parameter filled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""The dtypes of weights that can be lent. Eight-bit weights need scales, for which files have no standard."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its bytes; ``dtype`` is torch's own name, such as ``bfloat16``."""

    dtype: str
    shape: Shape

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
