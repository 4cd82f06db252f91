"""Copies of many small matrices, scaled, by one kernel: the factors of LoRAs into memory that graphs read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

_IS_INTERPRETED: Final = triton.knobs.runtime.interpret
_BLOCK: Final = 2**16 if _IS_INTERPRETED else 2**13
"""Numbers of a tile. Triton's interpreter takes 10 ms for each program."""
_NUMBERS: Final = 7


class Copy(NamedTuple):
    """``target = factors[factor] * source``: both (rows, columns) and of one dtype, columns side by side.

    The factor 0 is 1.0, so that the bits are those of the source.
    """

    source: torch.Tensor
    target: torch.Tensor
    factor: int = 0


@triton.jit
def _copy(segments_ptr, tiles_ptr, factors_ptr, example_ptr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    kind = example_ptr.dtype.element_ty
    segment = segments_ptr + tl.load(tiles_ptr + 2 * tile).to(tl.int64) * NUMBERS
    at = tl.load(tiles_ptr + 2 * tile + 1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(segment).to(tl.pointer_type(kind))
    target = tl.load(segment + 1).to(tl.pointer_type(kind))
    inside = at < tl.load(segment + 2).to(tl.int32)
    columns = tl.load(segment + 3).to(tl.int32)
    row, column = (at // columns).to(tl.int64), at % columns
    x = tl.load(source + row * tl.load(segment + 4) + column, mask=inside, other=0.0).to(tl.float32)
    x *= tl.load(factors_ptr + tl.load(segment + 6))
    tl.store(target + row * tl.load(segment + 5) + column, x.to(kind), mask=inside)


class FactorCopies:
    """Copies that are made again and again. Sources are not kept: they have to be where they were when these are made.

    Tensors are on one device and of one dtype; each has fewer than 2**31 numbers. There is at least one.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        scaled = [each for each in copies if each.factor]
        ordered = [*scaled, *(each for each in copies if not each.factor)]
        self._targets = [each.target for each in ordered]
        self._scaled = len(scaled)
        self.nbytes = sum(each.source.nbytes for each in ordered)
        self.scaled_nbytes = sum(each.source.nbytes for each in scaled)
        self._by_kernel = self._targets[0].is_cuda or _IS_INTERPRETED
        if not self._by_kernel:
            self._sources = [(weakref.ref(each.source), each.factor) for each in ordered]
            return
        numbers = [
            (
                each.source.data_ptr(), each.target.data_ptr(), each.source.numel(), each.source.shape[1],
                each.source.stride(0), each.target.stride(0), each.factor,
            )
            for each in ordered
        ]  # fmt: skip
        tiles = torch.tensor([-(-each.source.numel() // _BLOCK) for each in ordered])
        ends = tiles.cumsum(0)
        segments = torch.repeat_interleave(torch.arange(len(ordered)), tiles)
        within = torch.arange(int(ends[-1])) - (ends - tiles)[segments]
        device = self._targets[0].device
        self._segments = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
        self._tiles = torch.stack([segments, within], 1).to(torch.int32).to(device, non_blocking=True)
        self._scaled_tiles = int(ends[self._scaled - 1]) if self._scaled else 0

    def run(self, factors: Sequence[float], *, only_scaled: bool = False) -> int:
        """Make all copies, or those that have a factor, in the order of the stream; return the bytes that were read."""
        if self._by_kernel:
            self._run_kernel(factors, self._scaled_tiles if only_scaled else len(self._tiles))
        else:
            count = self._scaled if only_scaled else len(self._targets)
            for target, (source, factor) in zip(self._targets[:count], self._sources[:count], strict=True):
                given = source()
                assert given is not None, "the LoRA of a copy that is made is lent"
                target.copy_(given.float() * torch.tensor(factors[factor - 1]) if factor else given)
        return self.scaled_nbytes if only_scaled else self.nbytes

    def _run_kernel(self, factors: Sequence[float], tiles: int) -> None:
        if tiles:
            given = torch.tensor([1.0, *factors], dtype=torch.float32)
            given = given.to(self._segments.device, non_blocking=True)
            example = self._targets[0]
            _copy[(tiles,)](
                self._segments, self._tiles, given, example, NUMBERS=_NUMBERS, BLOCK=_BLOCK, num_warps=8
            )  # fmt: skip
