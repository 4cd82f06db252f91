"""A short run of the fuzzer: no crash, bounded memory, and another client served meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).resolve().parents[3] / "benchmarks" / "fuzz.py"


def test_hostile_bytes_harm_nobody() -> None:
    words = [sys.executable, str(FUZZ), "--bytes", "500000", "--parser-bytes", "300000", "--seed", "3", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures["failed"]) <= {"another client waited"}  # how long is for an idle machine to say
    assert figures["messages"] > 500
    assert figures["answers"]["bad_message"] > 400
    assert figures["answers"]["Welcome"] > 0  # a stranger's messages would all be refused alike
    assert figures["another client's answers"] > 10
