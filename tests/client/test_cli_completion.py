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


def completions(line: str, folder: Path, **environment: str) -> list[str]:
    """Return what a shell is offered after a line, in this folder."""
    found = folder / "found"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run(
        [sys.executable, "-m", "xditd"],
        env=os.environ | asked | environment,
        cwd=folder,
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


@pytest.mark.parametrize(("verb", "word"), [("comfyui", "uninstall"), ("cluster", "join"), ("models", "check")])
def test_actions_of_verbs_are_completed(tmp_path: Path, verb: str, word: str) -> None:
    (tmp_path / f"{word}.txt").write_text("")
    assert completions(f"xditd {verb} {word[:2]}", tmp_path) == [word]


def test_a_model_is_a_name_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "xditd").mkdir()
    (tmp_path / "xditd" / "models.toml").write_text("[flux]\nfolder = 'x'\n")
    (tmp_path / "flux1-dev").mkdir()
    (tmp_path / "flux1-dev.safetensors").write_text("")
    found = completions("xditd generate --model fl", tmp_path, XDG_CONFIG_HOME=str(tmp_path))
    assert set(found) == {"flux", "flux1-dev/", "flux1-dev.safetensors"}


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize("verb", ["adopt", "revoke"])
def test_ids_of_lent_components_are_completed(tmp_path: Path, folder: Path, verb: str) -> None:
    assert completions(f"xditd {verb} c", tmp_path, XDITD_RUNTIME_DIR=str(folder)) == ["c1", "c2", "c3"]
    assert completions(f"xditd {verb} c", tmp_path, XDITD_RUNTIME_DIR=str(tmp_path)) == [""]


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
