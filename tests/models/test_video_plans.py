"""Token plans of videos and audio hold for every kind of mask, of times and of conditions that the classes take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from video_calls import VIDEO_CALLS

TOLERANCE = 1e-6
Found = dict[str, tuple[float, bool]]


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """Return what a number of ranks found, by call."""

    @cache
    def run(ranks: int) -> Found:
        folder = tmp_path_factory.mktemp("videos")
        program = Path(__file__).with_name("video_plans_on_ranks.py")
        environment = os.environ | {"PYTHONPATH": str(program.with_name("support")), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(program), str(folder), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: Found = json.loads((folder / f"ranks{ranks}.json").read_text())
        return found

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", VIDEO_CALLS)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_ranks_give_what_the_class_gives(find: Callable[[int], Found], ranks: int, name: str) -> None:
    error, is_same_again = find(ranks)[name]
    assert error <= TOLERANCE
    assert is_same_again
