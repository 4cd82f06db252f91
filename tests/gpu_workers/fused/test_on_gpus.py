"""Fused blocks on real GPUs: no farther from float32 than plain modules are, and refused when they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("on_gpus.py")
ONE = pytest.param(1, marks=pytest.mark.gpu, id="one GPU")
TWO = pytest.param(2, marks=pytest.mark.multigpu, id="two GPUs")
# Both ways round to bfloat16 about as often; which of two such results is nearer is chance.
AS_NEAR = 1.15


@pytest.fixture(scope="module", params=[ONE, TWO])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fused")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(request.param)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "facts.json").read_text())


def test_fused_blocks_are_as_near_to_float32_as_plain_ones(facts: Any) -> None:
    assert len(facts["cases"]) == 5
    for case, found in facts["cases"].items():
        assert 0.0 < found["fused"] <= AS_NEAR * found["plain"], (case, found)


def test_repeats_have_the_same_bits(facts: Any) -> None:
    assert all(found["same bits twice"] for found in facts["cases"].values())


def test_the_canary_judged_every_number_of_tokens_and_refused_none(facts: Any) -> None:
    assert facts["canary"] == {"refused": False, "passed": 5}


def test_wrong_blocks_are_refused_and_the_plain_result_is_given(facts: Any) -> None:
    assert facts["broken"] == {"refused": True, "plain bits": True, "untouched": True}
