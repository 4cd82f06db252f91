"""Compiled blocks of the classes of diffusers, in programs of one and two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rounding import assert_rounding

CLASSES = (
    "ChromaTransformer2DModel",
    "CogView4Transformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "Lumina2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)
"""Those that are compiled; of all others, torch runs the graphs operation by operation."""


def run_ranks(out: Path, ranks: int, folder: str, *classes: str) -> dict[str, dict[str, dict[str, Any]]]:
    tests = Path(__file__).parents[2]
    support = os.pathsep.join(str(tests / each) for each in ("models/support", "gpu_workers/support"))
    environment = os.environ | {"PYTHONPATH": support, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = Path(__file__).with_name("compiled_ranks.py")
    command = [sys.executable, str(program), str(out), str(ranks), folder, *classes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(out.read_text())
    return found


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_graphs_of_all_classes_give_the_bits_of_their_forwards(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(tmp_path / "found.json", ranks, "-")
    compiled = 0
    for key, calls in found.items():
        for name, each in calls.items():
            if "error" not in each:
                assert each["reason"], (key, name)
                continue
            assert each["error"] == 0.0, (key, name, each)
            assert each["is_recorded_alike"], (key, name)
            assert each["is_eager_again"], (key, name)
            assert each["compiled"] or each["reason"], (key, name, each)
            compiled += not each["eager"]
    assert compiled > (150 if ranks == 1 else 100)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_classes_give_what_their_forwards_give(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(tmp_path / "found.json", ranks, str(tmp_path / "graphs"), *CLASSES)
    assert {key.partition("-")[0] for key in found} == set(CLASSES)
    for key, calls in found.items():
        for name, each in calls.items():
            if "error" in each:
                assert_rounding(each["error"], each["disturbed"].__getitem__)
                assert each["is_eager_again"], (key, name)
        assert any(each.get("compiled") and not each["eager"] for each in calls.values()) or "kv_" in key, key
