"""Programs beside these tests: each needs a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_program() -> Callable[..., None]:
    """Run a program of this folder, by name, with arguments, to its end; a failure shows what it wrote last."""

    def run(name: str, *arguments: object) -> None:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(name)), *(str(each) for each in arguments)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run
