"""Ctrl-C while a program of xditd is imported: it ends with 130, without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xditd.ipc.interrupted_imports import INTERRUPTED, interrupts_end_process

PRESSES = "import signal\nsignal.raise_signal(signal.SIGINT)\n"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["xditd", "xditd.daemon"])
@pytest.mark.parametrize("imported", ["msgspec", "zmq"])
def test_the_first_imports_end_quietly(tmp_path: Path, module: str, imported: str) -> None:
    (tmp_path / f"{imported}.py").write_text(PRESSES)
    done = run([sys.executable, "-m", module, "--help"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "zmq_ignored.py").write_text(PRESSES)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from xditd.ipc.interrupted_imports import interrupts_end_process\n"
        "with interrupts_end_process(): import zmq_ignored\n"
        "print('goes on')\n"
    )
    assert run([sys.executable, "-c", code], tmp_path).stdout == "goes on\n"


def test_afterwards_pythons_own_handler_is_back() -> None:
    with interrupts_end_process():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
