"""Agreement between ranks that are late by turns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_every_rank_learns_the_same(tmp_path):
    program = Path(__file__).with_name("meeting_ranks.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: agreed" for rank in range(4)]
