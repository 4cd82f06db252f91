"""Programs of this installation import nothing from the current folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from xditd.client.subprograms import module_command, module_environment

FOREIGN = ("queue", "socket", "logging", "pickle", "runpy", "torch", "sitecustomize", "xditd")


@pytest.fixture
def foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with modules that print when they are imported."""
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text(f"print('foreign {name}', flush=True)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("has_safe_path", [True, False])
@pytest.mark.parametrize("python_path", [None, ":", "."])
def test_nothing_is_imported_from_the_current_folder(
    foreign_folder: Path, monkeypatch: pytest.MonkeyPatch, has_safe_path: bool, python_path: str | None
) -> None:
    if python_path is not None:
        monkeypatch.setenv("PYTHONPATH", python_path)
    command = module_command("xditd.daemon", ["--version"], has_safe_path=has_safe_path)
    done = subprocess.run(command, env=module_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("xditd ")


def test_all_arguments_reach_the_program(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys; print(sys.argv, __name__)")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for has_safe_path in (True, False):
        command = module_command("mine", ["-c", "--x"], has_safe_path=has_safe_path)
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == f"[{str(tmp_path / 'mine.py')!r}, '-c', '--x'] __main__\n"


def test_environment_keeps_what_was_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/opt/lib:lib")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    found = module_environment()
    assert found["PYTHONPATH"] == f"/opt/lib:{tmp_path / 'lib'}"
    assert "PYTHONINSPECT" not in found
    monkeypatch.setenv("PYTHONPATH", ":")
    assert "PYTHONPATH" not in module_environment()
