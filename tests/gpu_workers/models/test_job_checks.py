"""Checks of a job's numbers and tensors: an error names the field, its value, and what is accepted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xditd.gpu_workers.models import job_checks
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_SIDE_PIXELS, MAX_STEPS


def test_schedules_that_run() -> None:
    job_checks.check_schedule(1, None)
    job_checks.check_schedule(MAX_STEPS, None)
    job_checks.check_schedule(3, (1.0, 0.5, 1e-9))


@pytest.mark.parametrize(
    ("side", "multiple"), [(0, 8), (-16, 8), (12, 8), (16, 32), (MAX_SIDE_PIXELS + 16, 16)], ids=str
)
def test_a_side_names_the_multiple_and_the_limit(side: int, multiple: int) -> None:
    says = f"{side}: use a multiple of {multiple} up to {MAX_SIDE_PIXELS} pixels"
    with pytest.raises(BadRequest, match=f"height {says}"):
        job_checks.check_sides(side, 64, multiple)
    with pytest.raises(BadRequest, match=f"width {says}"):
        job_checks.check_sides(64, side, multiple)
    job_checks.check_sides(64, MAX_SIDE_PIXELS, multiple)


def test_a_size_that_is_left_open_is_any_but_none() -> None:
    job_checks.check_shape("x", torch.zeros(2, 5), (2, None))
    with pytest.raises(BadRequest, match=r"x: shape is \[2, 0\], use \[2, any\]"):
        job_checks.check_shape("x", torch.zeros(2, 0), (2, None))
    with pytest.raises(BadRequest, match=r"x: shape is \[2\], use \[2, any\]"):
        job_checks.check_shape("x", torch.zeros(2), (2, None))
    with pytest.raises(BadRequest, match=r"x: str where a tensor is needed, \[2, any\]"):
        job_checks.check_shape("x", "text", (2, None))


@pytest.mark.parametrize("value", [-0.001, 1.001, 900.0, torch.nan, torch.inf])
def test_a_known_value_outside_its_range_comes_with_the_remedy(value: float) -> None:
    job_checks.check_known("timestep", {}, 0.0, 1.0, "give sigmas")
    job_checks.check_known("timestep", {"timestep": (0.0, 0.5, 1.0)}, 0.0, 1.0, "give sigmas")
    with pytest.raises(BadRequest, match=f"timestep: {value:g} is not a number from 0 to 1; give sigmas"):
        job_checks.check_known("timestep", {"timestep": (0.5, value)}, 0.0, 1.0, "give sigmas")


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_tensor_with_values_that_are_not_finite_is_named(dtype: torch.dtype) -> None:
    sound, broken = torch.ones(3).to(dtype), torch.tensor([1.0, torch.nan]).to(dtype)
    job_checks.check_finite({})
    job_checks.check_finite({"a": sound, "b": torch.ones(1)})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(BadRequest, match=f"b: some values are not finite in {name}"):
        job_checks.check_finite({"a": sound, "b": broken, "c": broken})


def test_what_is_prepared_is_cast_and_checked_as_the_model_has_it() -> None:
    model: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16)
    first, second = job_checks.prepare(model, a=torch.ones(2), b=torch.ones(3, dtype=torch.float64))
    assert first.dtype == second.dtype == torch.float16
    already = torch.ones(2, dtype=torch.float16)
    assert job_checks.prepare(model, a=already)[0] is already  # no copy: what is kept stays where it is
    with pytest.raises(BadRequest, match="b: some values are not finite in float16"):
        job_checks.prepare(model, a=torch.ones(1), b=torch.tensor([1e6]))
    with pytest.raises(BadRequest, match="a: dtype is int64, use a floating dtype"):
        job_checks.prepare(model, a=torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bits_are_refused_before_a_forward_ends_in_them(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(BadRequest, match=f"timestep: dtype is {name}, use float32, or a floating dtype of 16 bits"):
        job_checks.check_tensor("timestep", torch.zeros(1).to(dtype), (1,))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float8_e4m3fn"])
def test_results_go_into_no_dtype_that_cannot_hold_them(dtype: str) -> None:
    with pytest.raises(BadRequest, match=f"out_latents: dtype is {dtype}, use float32"):
        job_checks.check_output("out_latents", dtype)
    job_checks.check_output("out_latents", "bfloat16")
