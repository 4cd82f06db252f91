"""Z-Image on one GPU, which gives the bits of diffusers' class, and on two in every kind of layout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("on_gpus.py")
LAYOUTS = ("ulysses=2", "ring=2", "cfg=2")
# All round to bfloat16 about as often; which of two such results is nearer is chance.
AS_NEAR = 1.6
EXACT = 1e-5

Facts = dict[str, list[Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Facts]:
    """Run layouts; returns what each rank of each found."""

    def run_layouts(*layouts: str, ranks: int) -> Facts:
        folder = tmp_path_factory.mktemp("z_image_on_gpus")
        command = [sys.executable, str(PROGRAM), str(folder), *layouts]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return {
            layout: [json.loads((folder / f"{layout}-rank{rank}.json").read_text()) for rank in range(ranks)]
            for layout in layouts
        }

    return run_layouts


@pytest.fixture(scope="module")
def two(run: Callable[..., Facts]) -> Facts:
    return run(*LAYOUTS, ranks=2)


@pytest.mark.gpu
def test_one_gpu_gives_the_bits_of_the_class(run: Callable[..., Facts]) -> None:
    facts = run("ulysses=1", ranks=1)
    for case, found in facts["ulysses=1"][0]["cases"].items():
        for dtype, numbers in found.items():
            assert numbers["bits of the class"], (case, dtype, numbers)
            assert numbers["same bits"], (case, dtype)


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_as_near_to_float32_as_on_one_gpu(two: Facts, layout: str) -> None:
    for case, found in two[layout][0]["cases"].items():
        half = found["bfloat16"]
        for error, bar in zip(half["errors"], half["errors of the class"], strict=True):
            assert 0.0 < error <= AS_NEAR * bar, (case, half)


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_exact(two: Facts, layout: str) -> None:
    for case, found in two[layout][0]["cases"].items():
        assert max(found["float32"]["errors"]) <= EXACT, (case, found["float32"])


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_the_same_again_and_on_both_ranks(two: Facts, layout: str) -> None:
    first, second = two[layout]
    for case, found in first["cases"].items():
        for dtype, numbers in found.items():
            assert numbers["same bits"], (case, dtype)
            assert numbers["sum"] == second["cases"][case][dtype]["sum"], (case, dtype)
