"""Fused blocks on packed weights, in Triton's interpreter: the numbers of diffusers on what the weights mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

BAR = 1e-6
FORMATS = ("int8_convrot", "float8", "plain", "nvfp4", "mixed")

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_program: Callable[..., None]) -> Any:
    folder = tmp_path_factory.mktemp("interpreted_packed")
    run_program("interpreted_packed.py", folder / "found.json", folder / "store")
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("packed_format", FORMATS)
def test_fused_blocks_agree_with_plain_diffusers(found: Any, packed_format: str) -> None:
    assert found[packed_format]["error"] <= BAR
    assert found[packed_format]["used"] is True


@pytest.mark.parametrize("packed_format", FORMATS)
def test_modulations_of_many_steps_have_the_bits_of_single_ones(found: Any, packed_format: str) -> None:
    assert found[packed_format]["same bits"] is True


def test_the_scratch_buffer_is_freed_with_the_last_component(found: Any) -> None:
    assert found["scratch"] == 0
