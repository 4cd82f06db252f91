"""The suite's table compares figures with limits, and gives a reason for each missing figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_suite(*arguments: str, timeout_s: float = 30.0) -> str:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "suite", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lent(total_ms: float, peer_bytes: int) -> dict[str, Any]:
    phases = {"map": 1.0, "peer_copy": total_ms / 2, "total": total_ms}
    return {"total_ms": total_ms, "phases_ms": phases, "copied_bytes": {"peer": peer_bytes}}


@pytest.fixture
def report() -> dict[str, Any]:
    """A report of a run on two GPUs in which some parts failed."""
    jobs = {"workers_ms": [{"steps": 28 * 70.0, "decode": 80.0}] * 5, "client_ms": [2000.0, 1990.0, 1980.0]}
    return {
        "machine": {"gpus": ["NVIDIA H200, 580"] * 2, "cpu": "", "python": "3.12", "versions": {"torch": "2.11"}},
        "made": {
            "parameters": 11_900_000_000, "bytes": 23_800_000_000, "dtype": "bfloat16", "pixels": 1024,
            "tokens": 512, "steps": 28, "parity_steps": 12, "floor_ms": 94.1,
        },
        "parts": {
            "workers-2": {
                "lends": [lent(80.0, 23_800_000_000), lent(110.0, 23_800_000_000), lent(90.0, 23_800_000_000)],
                "latents": jobs,
                "denoise": {"kept_ms": [73.0]},
                "parity": {"diffusers_1": 0.006},
                "same_bits_again": True,
                "failed_stages": {"swap": "OutOfMemory: no room"},
                "files": {"cold_refused": "100% stay in memory"},
            },
            "xfuser-2": {"job_s": [28 * 0.14] * 5},
            "ceilings": {"peer_gb_s": 1000.0},
            "tensor-ipc": {"failed": "took longer than 75 s"},
            "layout-ring=2": {"failed": "unrecognized arguments: --layout=ring=2"},
        },
    }  # fmt: skip


@pytest.fixture
def table(report: dict[str, Any], tmp_path: Path) -> dict[str, str]:
    """Lines of the table by their first cell."""
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    lines = run_suite("--show", str(path)).splitlines()
    return {line[:46].strip(): " ".join(line.split()) for line in lines if line.strip()}


def line_of(table: dict[str, str], begins: str) -> str:
    return next(line for line in table.values() if line.startswith(begins))


def test_medians_bars_and_ratios(table: dict[str, str]) -> None:
    assert "90.0 ms (80.0-110.0, n 3) <= 100 ms: met" in line_of(table, "lend, model built, 2 workers")
    assert "0.500x xfuser-2" in line_of(table, "step of generate, 2 workers")
    assert "1990 ms (1980-2000, n 3) <= 2000 ms: met" in line_of(table, "all steps to latents, 2 workers")


def test_a_bar_on_a_ratio_judges_the_ratio(table: dict[str, str]) -> None:
    assert "<= 1.02x: MISSED 1.043x a step of generate" in line_of(table, "call from the client, 2 workers")
    assert ">= 0.9x: MISSED" in line_of(table, "copy to each other GPU, 2 workers")  # 529 of 1,000 GB/s


def test_what_is_missing_says_why_and_has_no_number(table: dict[str, str]) -> None:
    assert line_of(table, "swap: first step").endswith("- workers-2: OutOfMemory: no room")
    assert line_of(table, "lend a cold file, 2 workers").endswith("- 100% stay in memory")
    assert line_of(table, "ring=2: step of generate").endswith(
        "- layout-ring=2: unrecognized arguments: --layout=ring=2"
    )
    assert "tensor-ipc: took longer than 75 s" in line_of(table, "lend, model built, 2 workers")
    assert line_of(table, "plain kernels: step, 2 workers").endswith("- plain-2 was not asked for")


@pytest.mark.long
@pytest.mark.slow
def test_a_part_that_fails_keeps_its_place_and_a_run_goes_on(tmp_path: Path) -> None:
    """diffusers' single-file converter fails on the width of the small transformer."""
    path = tmp_path / "suite.json"
    parts = ["ceilings", "load-single-file", "load-safetensors"]
    common = ["--device", "cpu", "--small", "--json", str(path), "--patience", "10", "--files", str(tmp_path / "files")]
    run_suite(*common, "--only", *parts, timeout_s=280)
    first = json.loads(path.read_text())["parts"]
    assert list(first) == parts
    assert "split_sizes" in first["load-single-file"]["failed"]
    assert "warm_ms" not in first["load-single-file"]
    assert len(first["load-safetensors"]["warm_ms"]) == 3

    table = run_suite(*common, "--only", "ceilings", "load-safetensors", "--resume", timeout_s=120)
    assert json.loads(path.read_text())["parts"] == first  # nothing was measured again
    assert "split_sizes" in table
