"""Completions of the shell: by argcomplete, as a shell asks for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xditd.client.cli import exits
from xditd.client.cli.main import main


def completions(line: str, folder: Path) -> list[str]:
    """Return what a shell is offered after a line."""
    found = folder / "found"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run(
        [Path(sys.executable).with_name("xditd")],
        env=os.environ | asked,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    return [each.strip() for each in found.read_text().split("\n")]


def test_verbs_and_flags_are_completed(tmp_path: Path) -> None:
    assert completions("xditd st", tmp_path) == ["status", "stop"]
    assert set(completions("xditd status --", tmp_path)) >= {"--runtime-dir", "--json", "--check", "--watch"}
    assert completions("xditd completion z", tmp_path) == ["zsh"]


def test_values_of_flags_are_completed(tmp_path: Path) -> None:
    assert completions("xditd generate --compute-dtype ", tmp_path) == ["bfloat16", "float16", "float32"]
    assert set(completions("xditd serve --device c", tmp_path)) == {"cuda", "cpu"}
    assert "--layout" in completions("xditd serve --la", tmp_path)[0]
    assert completions("xditd models add x --compute-dtype b", tmp_path) == ["bfloat16"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_takes_the_lines(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == exits.DONE
    lines = capsys.readouterr().out
    assert "xditd" in lines
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell}: not installed here")
    script = tmp_path / "script"
    script.write_text(lines)
    subprocess.run([program, "-n", str(script)], check=True, timeout=60)
    if shell == "bash":
        subprocess.run([program, "-c", f"source {script} && complete -p xditd"], check=True, timeout=60)


def test_another_shell_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "tcsh"])
    assert ended.value.code == exits.MISUSE
    assert "tcsh" in capsys.readouterr().err
