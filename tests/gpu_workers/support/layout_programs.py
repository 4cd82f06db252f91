"""Run a program that computes its cases in one layout of ranks after another, and compare what each rank wrote.

The program has ``LAYOUTS``. ``PROGRAM FOLDER LAYOUT`` writes ``LAYOUT/rank<N>.safetensors`` with tensors
``CASE/ROUND/ROW``, of two rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from forked_programs import ProgramServer
from safetensors.torch import load_file

from xditd.ipc.degrees import Degrees, parse_layout

Results = list[dict[str, torch.Tensor]]
"""The tensors of each rank, by name."""
Computed = Callable[[str], Results]
"""Returns the results of a layout."""


def layout_parameters(layouts: Iterable[str], long: tuple[str, ...]) -> list[object]:
    """Return layouts as parameters of tests; those in ``long`` run only where long tests do."""
    return [pytest.param(layout, marks=pytest.mark.long if layout in long else ()) for layout in layouts]


def computed_by(program: Path, folder: Path, fork_program: ProgramServer) -> Computed:
    """Return a function that runs the program for a layout, once."""

    @cache
    def run(layout: str) -> Results:
        done = fork_program(program, folder, layout)
        assert done.returncode == 0, done.stderr[-4000:]
        ranks = range(Degrees(**parse_layout(layout)).world_size)
        return [load_file(folder / layout / f"rank{rank}.safetensors") for rank in ranks]

    return run


def check_agrees(
    results: Mapping[str, torch.Tensor],
    expected: Mapping[str, Iterable[torch.Tensor]],
    error_of: Callable[[torch.Tensor, torch.Tensor], float],
    bar: float,
) -> None:
    """Check each row of each case against what is expected of it."""
    assert expected
    for case, rows in expected.items():
        for row, right in enumerate(rows):
            error = error_of(results[f"{case}/0/{row}"], right)
            assert error <= bar, f"{case}, row {row}: {error:.2e}"


def check_same_bits(results: Results) -> None:
    """Check that both rounds and all ranks have the same bits."""
    first, *others = results
    assert first
    for name, tensor in first.items():
        case, attempt, row = name.split("/")
        assert torch.equal(tensor, first[f"{case}/{1 - int(attempt)}/{row}"]), name
        assert all(torch.equal(tensor, results_of_rank[name]) for results_of_rank in others), name
