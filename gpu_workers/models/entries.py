"""A checkpoint as a list of tensors, and the module parameters that each of them fills.

A family describes a checkpoint as a list of :class:`Entry`: one source tensor, its shape, and the
module parameters that it fills, one below the other along its first dimension. From that list follow
the key map (:class:`Slice`: every parameter is a *view* of one source) and the proof that it is a
bijection: each source element used once, each parameter filled once (``resolution.py``).
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
"""What can be run as it is lent. Eight-bit weights need scales, which files keep in no agreed place."""


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
    """One source tensor under its canonical name, and the ``(parameter, rows)`` that share its first dimension.

    ``view`` is the shape of the only parameter, where the same numbers are seen in another one: a 1x1 convolution that
    is a linear layer, or six vectors that are rows of a matrix.
    """

    source: str
    shape: Shape
    targets: tuple[tuple[str, int], ...]
    view: Shape | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A parameter as a view: rows ``start`` to ``stop`` of ``source``, seen as ``shape`` where that differs."""

    source: str
    start: int
    stop: int
    shape: Shape | None = None


def tensor_entry(source: str, shape: Shape, *targets: str, rows: tuple[int, ...] = ()) -> Entry:
    """Describe a tensor that fills ``targets`` in this order, with equal parts or with so many ``rows`` each.

    Without targets it fills the parameter of its own name.
    """
    targets = targets or (source,)
    return Entry(source, shape, tuple(zip(targets, rows or (shape[0] // len(targets),) * len(targets), strict=True)))


def layer_entries(source: str, shape: Shape, *targets: str, rows: tuple[int, ...] = ()) -> Iterator[Entry]:
    """Describe the weight, of this shape, and the bias of a layer: as :func:`tensor_entry`, by names of layers."""
    for part, part_shape in (("weight", shape), ("bias", shape[:1])):
        yield tensor_entry(f"{source}.{part}", part_shape, *(f"{target}.{part}" for target in targets), rows=rows)
