"""Ranks exchange their uploaded shares; a failure on one ends on all alike, with nothing left open."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked_programs import ProgramServer


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_the_shares_of_all(tmp_path: Path, fork_program: ProgramServer, ranks: int) -> None:
    done = fork_program(Path(__file__).with_name("sharing_ranks.py"), tmp_path, ranks)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: complete" for rank in range(ranks)]
