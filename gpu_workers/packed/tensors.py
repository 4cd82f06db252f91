"""A packed weight in memory: views of the lent bytes and of their companions, and slices of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from xditd.ipc.packed import SCALED_COLUMNS, TILE_ROWS, PackedFormat, PackedWeight

Shape = tuple[int, ...]

Product = Callable[[torch.Tensor, "PackedTensor", "torch.Tensor | None"], torch.Tensor]
"""Multiplies an input (..., columns) by a packed weight and adds its bias: (..., rows) in the dtype of the input."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """Views of one packed weight, or of some of its rows.

    ``scale`` has no dimensions if it is one for all, (rows, 1) if each row has its own, or the tiles of the format.
    ``scale_2`` and ``input_scale`` have no dimensions. ``native`` is the product that runs in place of that of the
    dequantised weight, if one was chosen; ``why_not_native`` says why none was.
    """

    format: PackedFormat
    shape: Shape
    values: torch.Tensor
    scale: torch.Tensor | None = None
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    group: int = 0
    quantises_input: bool = True
    native: Product | None = None
    why_not_native: str = ""

    @classmethod
    def of(cls, packed: PackedWeight, tensors: Mapping[str, torch.Tensor]) -> PackedTensor:
        """View a packed weight among ``tensors``, which have passed ``weight_faults``."""
        given = {field: tensors[name] for field, name in packed.companions.items()}
        scale = given.get("scale")
        if scale is not None and packed.format in SCALED_COLUMNS:
            scale = scale.view(torch.uint8 if packed.format == "mxfp8" else torch.float8_e4m3fn)
        elif scale is not None:
            scale = scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
        scale_2, input_scale = (
            given[field].view(()) if field in given else None for field in ("scale_2", "input_scale")
        )
        return cls(
            packed.format,
            packed.shape,
            tensors[packed.weight],
            scale,
            scale_2,
            input_scale,
            packed.group,
            packed.quantises_input,
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All views, the values first."""
        return [each for each in (self.values, self.scale, self.scale_2, self.input_scale) if each is not None]

    def is_contiguous(self) -> bool:
        return all(each.is_contiguous() for each in self.tensors)

    def rows(self, start: int, stop: int) -> PackedTensor:
        """Return the rows from ``start`` to ``stop``, as views of the same memory.

        Scales in tiles need multiples of 128 rows; ``stop`` may be the last row of all.
        """
        scale = self.scale
        if scale is not None and self.format in SCALED_COLUMNS:
            assert start % TILE_ROWS == 0
            assert stop % TILE_ROWS == 0 or stop == self.shape[0]
            scale = scale[start : -(-stop // TILE_ROWS) * TILE_ROWS]
        elif scale is not None and scale.ndim:
            scale = scale[start:stop]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, values=self.values[start:stop], scale=scale)

    def as_matrix(self) -> PackedTensor:
        """Return it with two dimensions, rows and columns: a 1x1 convolution as the weight of a linear layer."""
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        is_plain = self.values.shape == self.shape
        return replace(self, shape=(rows, columns), values=self.values.view(rows, columns) if is_plain else self.values)
