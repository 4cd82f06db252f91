"""benchmarks/run.py lists its parts and their needs, and refuses unknown parts and missing GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
PARTS = sorted(path.stem for path in (RUN.parent / "parts").glob("*.py"))
ALL_HELP = """
import sys
sys.path.insert(0, sys.argv[1])
import run
for part in run.names():
    try:
        run.run(part, ["--help"])
    except SystemExit as end:
        assert end.code == 0, part
"""


def command(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": ""}  # without nvidia-smi there is no GPU
    done = subprocess.run(
        [sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done


def test_list_names_every_part_and_what_it_needs() -> None:
    lines = command("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines[::2]] == PARTS
    for name, needs in zip(lines[::2], lines[1::2], strict=True):
        assert needs.strip().removeprefix("Needs:"), name


def test_an_unknown_part_is_refused_with_the_names_of_all() -> None:
    assert (
        f"no_such_part: there is no such part; the parts are {', '.join(PARTS)}"
        in command("no_such_part", status=2).stderr
    )


@pytest.mark.slow
def test_every_part_imports_and_shows_its_help() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, str(RUN.parent)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for part in PARTS:
        assert f"usage: run.py {part} " in done.stdout


@pytest.mark.slow
def test_a_part_that_needs_a_gpu_is_skipped_by_name_where_there_is_none() -> None:
    assert "skipped: step_time: needs 2 GPU(s)" in command("step_time", "--workers", "2", status=77).stderr


@pytest.mark.long
@pytest.mark.slow
def test_several_parts_report_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command("ceilings", "tensor_ipc", "--json", str(path), status=77)
    found = json.loads(path.read_text())
    assert found["ceilings"] == found["tensor_ipc"] == {"status": 77}
