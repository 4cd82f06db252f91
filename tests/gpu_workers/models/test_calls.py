"""The rows of a call are split over the halves of a group: each runs once, and every rank gets all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_programs import ProgramServer, load_program
from safetensors.torch import load_file

from xditd.gpu_workers.parallel.layouts import ParallelLayout

PROGRAM = Path(__file__).with_name("calling_ranks.py")
calling_ranks = load_program(PROGRAM)


@pytest.fixture(scope="module")
def halves(
    tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer
) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """What each of two ranks got, and which rows it ran."""
    folder = tmp_path_factory.mktemp("calls")
    done = fork_program(PROGRAM, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        (load_file(folder / f"rank{rank}.safetensors"), json.loads((folder / f"rank{rank}.json").read_text()))
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", calling_ranks.CASES)
def test_every_rank_gets_every_row_of_every_part_in_its_shape(halves: Any, case: str) -> None:
    for tensors, _ in halves:
        for part, rows in enumerate(calling_ranks.rows_of(case)):
            for number, row in enumerate(rows):
                assert torch.equal(tensors[f"{case}/{part}/{number}"], 2 * row)
            assert f"{case}/{part}/{len(rows)}" not in tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("equal parts", [[0]], [[12]]),
        ("unequal parts", [[0]], [[12]]),
        ("the longer part first", [[0]], [[20]]),
        ("unequal rows of one part", [[0, 4]], [[11]]),
        ("a part that is cut", [[0], [2]], [[8, 14]]),
        ("fewer rows than halves", [[0]], [[0]]),  # both do the one row
        ("a part without rows", [[0]], [[2]]),
    ],
)
def test_halves_share_the_rows_out(halves: Any, case: str, first: Any, second: Any) -> None:
    assert [ran[case] for _, ran in halves] == [first, second]


@pytest.mark.parametrize("case", calling_ranks.CASES)
def test_one_half_runs_each_part_whole(layout: ParallelLayout, case: str) -> None:
    found, ran = calling_ranks.run(case, layout)
    parts = calling_ranks.rows_of(case)
    assert ran == [[float(row.flatten()[0]) for row in rows] for rows in parts]
    for rows, expected in zip(found, parts, strict=True):
        assert len(rows) == len(expected)
        assert all(torch.equal(row, 2 * right) for row, right in zip(rows, expected, strict=True))
