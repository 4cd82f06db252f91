"""Products in eight bits in Triton's interpreter on the CPU: rounding, scales and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

# e4m3 has three bits behind the point: 2.6 % of a number that falls anywhere between two of them, in the mean.
ROUNDING = 0.03

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_program: Callable[..., None]) -> Any:
    folder = tmp_path_factory.mktemp("eight_bits")
    run_program("eight_bits.py", folder / "found.json", folder / "store")
    return json.loads((folder / "found.json").read_text())


def test_rows_are_rounded_as_torch_rounds_them(found: Any) -> None:
    cases = found["quantiser"]
    assert len(cases) == 6
    for label in ("torch.float32 x", "torch.bfloat16 x"):
        assert cases[label]["scales"] == 0.0
        assert cases[label]["other values"] < 1e-3  # ties that a product by the inverse puts on the other side
    # GELU comes from another formula, so that a bfloat16 is the next one now and then, and with it a scale.
    assert all(case["other values"] < 0.05 and case["scales"] < 2**-6 for case in cases.values()), cases
    assert all(0.01 < case["error"] < ROUNDING for case in cases.values()), cases


def test_modulating_into_eight_bits_is_rounding_what_is_modulated(found: Any) -> None:
    assert found["modulation"] == 0.0


def test_each_kind_of_product_is_that_of_its_rounded_numbers(found: Any) -> None:
    errors = found["products"]
    # GELU's last bit moves a few numbers behind it over a tie.
    bars = {"multiply": 1e-6, "some outputs": 1e-6, "images of both": 1e-6, "mlp": 2e-3, "mlp and attention": 2e-3}
    assert errors.keys() == bars.keys()
    assert all(errors[label] <= bar for label, bar in bars.items()), errors


def test_packed_weights_are_multiplied_as_those_that_are_quantised_here(found: Any) -> None:
    assert found["packed"] == {"same bits": [True] * 4, "counted": 6}


def test_scales_of_a_file_round_the_inputs_of_each_layer(found: Any) -> None:
    case = found["given scales"]
    assert case["other values"] == [0.0, 0.0]
    assert case["cut off"] == 448.0
    assert all(error < 2e-3 for error in case["errors"]), case  # GELU's last bit, as above
    assert case["scales"] == [[pytest.approx(0.004), pytest.approx(0.008)]] * 2


def test_a_whole_model_is_off_by_rounding_and_not_by_more(found: Any) -> None:
    model = found["model"]
    assert 1e-3 < model["error"] < 0.05
    assert 1e-3 < model["another checkpoint"] < 0.05  # its weights were rounded anew
    assert model["same bits"] is True


def test_the_error_is_measured_and_judged_by_a_tolerance_of_its_own(found: Any) -> None:
    model = found["model"]
    assert 1e-3 < model["check"]["error"] < model["check"]["tolerance"]
    assert model["check"]["label"] == "fp8 FLUX.1 blocks"


def test_a_wrong_copy_is_refused_and_the_plain_result_is_given(found: Any) -> None:
    assert found["model"]["broken"]["refused"] is True
    assert found["model"]["broken"]["error"] <= 1e-6


def test_the_copy_is_counted_and_freed(found: Any) -> None:
    width = 2 * 128
    weights = 2 * 2 * 12 * width * width + 2 * 12 * width * width
    scales = 2 * 2 * 9 * width + 2 * 8 * width
    assert found["model"]["reserved"] == weights + 4 * scales
    assert found["model"]["held after unplug"] is False
    assert found["model"]["held when idle"] is False
