"""Calls of a module by rows: all ranks give what one would give, and fail together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_programs import ProgramServer

from xditd.gpu_workers.jobs.module_rows import ModulePart, ModuleRows
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import Numerics

SCENARIOS = 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "device"),
    [(2, "cpu"), pytest.param(3, "cpu", marks=pytest.mark.long), pytest.param(2, "cuda", marks=pytest.mark.multigpu)],
)
def test_ranks_share_parts_and_rows(tmp_path: Path, fork_program: ProgramServer, ranks: int, device: str) -> None:
    program = Path(__file__).with_name("rows_on_ranks.py")
    if device == "cpu":
        done = fork_program(program, tmp_path, ranks, device)
    else:  # a process that was forked can use no GPU
        command = [sys.executable, str(program), str(tmp_path), str(ranks), device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == ranks * SCENARIOS


def lent_to_one_rank() -> Any:
    layout = SimpleNamespace(rank=0, world_size=1)
    return SimpleNamespace(layout=layout, ranks=Ranks(None, 0, 1), paths=SimpleNamespace(is_on=False))


def test_one_rank_runs_every_part_as_it_is() -> None:
    """Nothing is looked up, copied or checked."""
    model = lent_to_one_rank()
    parts = [{"x": torch.ones(2)}, {"x": torch.zeros(2)}]
    seen: list[Any] = []
    rows = ModuleRows(model, "forward", Numerics(), lambda arguments: seen.append(arguments) or len(seen))
    assert rows.run([ModulePart(part, on_all_ranks=False) for part in parts]) == [1, 2]
    assert all(mine is its for mine, its in zip(seen, parts, strict=True))


def test_one_rank_raises_what_the_class_raises() -> None:
    model = lent_to_one_rank()

    def fails(_: Any) -> Any:
        raise BadRequest("refused")

    with pytest.raises(BadRequest, match="refused"):
        ModuleRows(model, "forward", Numerics(), fails).run([ModulePart({}, on_all_ranks=False)])
