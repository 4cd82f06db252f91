"""Run forwards of a transformer, their rows split over the two halves of a group (CFG parallel)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.controls import with_controls
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.operations import CallOptions, Inputs, RowResults, TransformerOperations
from xditd.gpu_workers.parallel import component_layouts
from xditd.gpu_workers.parallel.row_partition import gather_flat, halves, own_rows, rows_of_half


def run_parts(
    model: CachedModel, operations: TransformerOperations[Any], parts: Sequence[Inputs], options: CallOptions
) -> list[RowResults]:
    """Run independent, checked forwards; return the rows of each, on every rank, in the weights' dtype.

    The halves of a group split the rows of all forwards, so that prompts and negative prompts of other lengths run at
    the same time. With fewer rows than halves, each half runs all of them.
    """
    component_layouts.use(model.layout)
    shapes = [operations.rows(part) for part in parts]
    total = sum(map(len, shapes))
    if halves() == 1 or total < halves():
        return [_run(model, operations, part, options) for part in parts]
    mine = own_rows(total)
    done: list[torch.Tensor] = []
    start = 0
    for part, rows in zip(parts, shapes, strict=True):
        share = slice(max(mine.start - start, 0), min(mine.stop - start, len(rows)))
        if share.start < share.stop:
            is_whole = share.stop - share.start == len(rows)
            done += _run(model, operations, part if is_whole else _take_rows(operations, part, share), options)
        start += len(rows)
    return _group_by_part(_gather_rows(done, [shape for rows in shapes for shape in rows]), shapes)


def _run(model: CachedModel, operations: TransformerOperations[Any], part: Inputs, options: CallOptions) -> RowResults:
    if part.controls:
        part = with_controls(model, operations, part, options.variant)
    return operations.run(model, part, options)


def _take_rows(operations: TransformerOperations[Any], part: Inputs, rows: slice) -> Inputs:
    taken = operations.take_rows(part, rows)
    return replace(taken, controls=tuple(each.take_rows(rows) for each in part.controls)) if part.controls else taken


def _gather_rows(mine: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> list[torch.Tensor]:
    """Gather the rows of both halves, as one flat tensor, since rows may differ in shape."""
    per_half = [[math.prod(shape) for shape in shapes[rows_of_half(len(shapes), half)]] for half in range(halves())]
    gathered = gather_flat(torch.cat([row.reshape(-1) for row in mine]), max(map(sum, per_half)))
    flat = [row for half, sizes in zip(gathered, per_half, strict=True) for row in half[: sum(sizes)].split(sizes)]
    return [row.view(shape) for row, shape in zip(flat, shapes, strict=True)]


def _group_by_part(rows: list[torch.Tensor], shapes: Sequence[Sequence[Shape]]) -> list[RowResults]:
    found: list[RowResults] = []
    for part in shapes:
        found.append(rows[: len(part)])
        rows = rows[len(part) :]
    return found
