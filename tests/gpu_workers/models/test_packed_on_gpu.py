"""Packed weights on a GPU: diffusers' class on what they mean, products that repeat, and memory that comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("packed_on_device.py")
pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packed_on_gpu")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), "cuda:0"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    print(json.dumps(found, indent=1))
    return found


def test_dequantised_products_agree_with_plain_diffusers(facts: dict[str, Any]) -> None:
    dequantised = {case: found for case, found in facts.items() if not case.endswith("native")}
    assert dequantised
    for case, found in dequantised.items():
        assert found["error"] <= (1e-5 if "float32" in case else 3e-2), case
        assert found["native"] == 0, case


def test_native_products_are_off_by_the_rounding_of_the_input(facts: dict[str, Any]) -> None:
    native = {case: found for case, found in facts.items() if case.endswith("native")}
    assert native
    for case, found in native.items():
        assert 0.0 < found["error"] <= 0.1, case
        assert found["native"] > 0, (case, found["detail"])


def test_repeats_have_the_same_bits(facts: dict[str, Any]) -> None:
    assert [case for case, found in facts.items() if not found["same bits twice"]] == []


def test_fused_blocks_run_packed_weights_in_half_precision(facts: dict[str, Any]) -> None:
    for case, found in facts.items():
        is_float8 = "bfloat16 native" in case and "float8" in case
        used = [f"{'fp8' if is_float8 else 'fused'} FLUX.1 blocks"] if "bfloat16" in case else list(found["checks"])
        assert found["checks"] == dict.fromkeys(used, True), case


def test_memory_is_that_of_the_packed_bytes_and_comes_back(facts: dict[str, Any]) -> None:
    for case, found in facts.items():
        assert found["lent"] < found["bytes"] * 1.1 + found["scratch"] + 2**22, case
        assert found["left"] < 2**22, case
