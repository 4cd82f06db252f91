"""Strengths of LoRAs: numbers, one for each step, and pairs of a step and a strength."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.client.loras.strengths import strengths_by_step
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import StepStrength


@pytest.mark.parametrize(
    ("given", "first", "later"),
    [
        (0.5, 0.5, ()),
        (-2, -2.0, ()),
        ([0.5], 0.5, ()),
        ([0.0, 0.0, 1.0, 1.0, 0.5], 0.0, ((2, 1.0), (4, 0.5))),
        ([(0, 0.3), (4, 0.7)], 0.3, ((4, 0.7),)),
        (((3, 0.7), (9, 0.0)), 0.0, ((3, 0.7), (9, 0.0))),
        ([(0, 1.0), (5, 1.0)], 1.0, ()),
    ],
)
def test_strengths_by_step(given: Any, first: float, later: tuple[tuple[int, float], ...]) -> None:
    assert strengths_by_step(given) == (first, tuple(StepStrength(*each) for each in later))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (float("nan"), r"the strength nan is not from -1e\+06 to 1e\+06"),
        ([1.0, float("inf")], "the strength inf"),
        ("1", "the strength '1'"),
        (None, "the strength None"),
        (1e7, r"the strength 10000000.0 is not from -1e\+06 to 1e\+06"),
        pytest.param(10**400, r"the strength 10+ is not from", id="integer"),
        pytest.param([10**400], r"the strength 10+ is not from", id="integers"),
        ([], "are empty"),
        ([(0, 1.0), 0.5], "numbers or pairs of a step and a number, not 0.5"),
        ([(2, 1.0), (1, 0.5)], r"the steps of strengths are \[2, 1\]; they have to ascend"),
        ([(1, 1.0), (1, 0.5)], "they have to ascend"),
        ([(-1, 1.0)], "the step -1 of a strength"),
        ([(0.5, 1.0)], "the step 0.5 of a strength"),
        ([(1000, 1.0)], "the step 1000 of a strength"),
        ([0.0] * 1001, "1001 strengths by step, at most 1000"),
    ],
)
def test_what_is_no_strength_is_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        strengths_by_step(given)
