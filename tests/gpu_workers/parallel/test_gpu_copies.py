"""Ranks exchange uploaded shares, and pass lent blocks along; a failure on one ends on all, with nothing left open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forked_programs import ProgramServer

PASSING = Path(__file__).with_name("passing_ranks.py")


def complete(ranks: int) -> list[str]:
    return [f"rank {rank}: complete" for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_the_shares_of_all(tmp_path: Path, fork_program: ProgramServer, ranks: int) -> None:
    done = fork_program(Path(__file__).with_name("sharing_ranks.py"), tmp_path, ranks)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == complete(ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_lent_blocks_from_the_one_before(
    tmp_path: Path, fork_program: ProgramServer, ranks: int
) -> None:
    done = fork_program(PASSING, tmp_path, ranks)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == complete(ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_pass_lent_blocks_along(tmp_path: Path, ranks: int) -> None:
    """With fewer GPUs than ranks some share one: the ways between processes are the same."""
    done = subprocess.run(
        [sys.executable, str(PASSING), str(tmp_path), str(ranks), "cuda"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.splitlines()) == complete(ranks)
