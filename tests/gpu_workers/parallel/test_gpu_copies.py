"""Ranks exchange their uploaded shares; a failure on one ends on all alike, with nothing left open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_the_shares_of_all(tmp_path: Path, ranks: int) -> None:
    program = Path(__file__).with_name("sharing_ranks.py")
    command = [sys.executable, str(program), str(tmp_path), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: complete" for rank in range(ranks)]
