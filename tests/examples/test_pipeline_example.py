"""The example of ``Pipeline`` runs as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flux1_words
import pytest
from running_daemon import RunningDaemon

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "folder_to_picture.py"


@pytest.mark.slow
def test_a_folder_becomes_pictures(one_worker: RunningDaemon, tmp_path: Path) -> None:
    folder = flux1_words.saved(tmp_path / "flux")
    command = [sys.executable, str(EXAMPLE), str(folder), "a cat", "--runtime-dir", str(one_worker.runtime_dir)]
    command += ["--size", "96x64", "--steps", "2", "--seed", "7", "--count", "2", "--out", str(tmp_path / "cat.png")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "step 2 of 2" in ran.stdout
    assert "seed 7" in ran.stdout
    assert {each.name for each in tmp_path.glob("*.png")} == {"cat-0.png", "cat-1.png"}
