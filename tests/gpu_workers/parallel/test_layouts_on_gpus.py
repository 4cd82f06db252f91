"""Ulysses, ring and CFG parallel on two GPUs: as near to float32 as one GPU is, and the same bits again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multigpu

PROGRAM = Path(__file__).with_name("layouts_on_gpus.py")
LAYOUTS = ("ulysses=2", "ring=2", "cfg=2")
# All round to bfloat16 about as often; which of two such results is nearer is chance.
AS_NEAR = 1.6  # on H200s up to 1.37 was seen: these are largest differences, of images of 49 tokens
EXACT = 1e-5


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank of each layout found."""
    folder = tmp_path_factory.mktemp("layouts_on_gpus")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        layout: [json.loads((folder / f"{layout}-rank{rank}.json").read_text()) for rank in (0, 1)]
        for layout in LAYOUTS
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_as_near_to_float32_as_on_one_gpu(facts: Any, layout: str) -> None:
    for case, found in facts[layout][0]["cases"].items():
        half = found["bfloat16"]
        for error, bar in zip(half["errors"], half["errors of one GPU"], strict=True):
            assert 0.0 < error <= AS_NEAR * bar, (case, half)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_exact(facts: Any, layout: str) -> None:
    for case, found in facts[layout][0]["cases"].items():
        assert max(found["float32"]["errors"]) <= EXACT, (case, found["float32"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_the_same_again_and_on_both_ranks(facts: Any, layout: str) -> None:
    first, second = facts[layout]
    for case, found in first["cases"].items():
        for dtype, numbers in found.items():
            assert numbers["same bits"], (case, dtype)
            assert numbers["sum"] == second["cases"][case][dtype]["sum"], (case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_whose_heads_need_another_layout_take_turns_in_one_group(facts: Any, layout: str) -> None:
    first, second = (rank["mixed"] for rank in facts[layout])
    for case, found in first["cases"].items():
        half, full = found["bfloat16"], found["float32"]
        for error, bar in zip(half["errors"], half["errors of one GPU"], strict=True):
            assert 0.0 < error <= AS_NEAR * bar, (case, half)
        assert max(full["errors"]) <= EXACT, (case, full)
        for dtype, numbers in found.items():
            assert numbers["same bits"], (case, dtype)
            assert numbers["the usual one gives the same bits"], (case, dtype)
            assert numbers["sum"] == second["cases"][case][dtype]["sum"], (case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_heads_run_in_a_ring_where_tokens_are_split(facts: Any, layout: str) -> None:
    degrees = {"ulysses": 1, "ring": 1, "cfg": 2} if layout == "cfg=2" else {"ulysses": 1, "ring": 2, "cfg": 1}
    for rank in facts[layout]:
        for dtype in ("bfloat16", "float32"):
            found = rank["mixed"][dtype]
            assert found["degrees"] == degrees
            assert found["fused"] == (layout == "cfg=2" and dtype == "bfloat16")


def test_fused_kernels_run_where_there_is_no_ring(facts: Any) -> None:
    for layout in ("ulysses=2", "cfg=2"):
        for rank in facts[layout]:
            assert rank["fused"], layout
            assert not rank["check"]["bfloat16"]["refused"], layout
            assert rank["check"]["bfloat16"]["passed"] > 0, layout
    for rank in facts["ring=2"]:
        assert rank["fused"] is None
        assert rank["check"] == {}
