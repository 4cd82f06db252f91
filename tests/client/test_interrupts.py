"""Ctrl-C while torch is imported: its C++ code drops the exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xditd.client.interrupts import interrupts_wait

SWALLOWS = """\
import signal

try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
"""
PROGRAM = """\
from xditd.client.tensor_files import require_torch

try:
    require_torch()
except KeyboardInterrupt:
    print("interrupted")
"""


def interrupted(times: int, reached: list[int]) -> None:
    with interrupts_wait():
        for number in range(1, times + 1):
            signal.raise_signal(signal.SIGINT)
            reached.append(number)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_waits_and_a_second_one_does_not(times: int) -> None:
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(times, reached)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_import_of_torch_loses_no_interrupt(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SWALLOWS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "interrupted\n"
