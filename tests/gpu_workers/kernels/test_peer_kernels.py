"""Heads and tokens go to the memory of the rank that needs them, at any counts, sizes and strides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_heads_and_tokens_are_where_they_should_be() -> None:
    program = Path(__file__).with_name("interpreted_peers.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
