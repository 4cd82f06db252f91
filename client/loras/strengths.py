"""The strength of a LoRA: a number, or strengths by step of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import StepStrength
from xditd.ipc.loras import MAX_SCALE

Strength = float | Sequence[float] | Sequence[tuple[int, float]]
"""A number; one for each step, of which the last one stays; or pairs of a step and the strength from there on."""


def strengths_by_step(given: Any) -> tuple[float, tuple[StepStrength, ...]]:
    """Return the strength of the first step, and the changes from later steps on.

    Raises:
        BadRequest: what is no strength, or beyond ``MAX_SCALE``; names it.
    """
    if not isinstance(given, list | tuple):
        return _number(given), ()
    if not given:
        raise BadRequest("loras: strengths by step are empty; give a number")
    if len(given) > limits.MAX_STEPS:
        raise BadRequest(f"loras: {len(given)} strengths by step, at most {limits.MAX_STEPS}")
    if any(isinstance(each, list | tuple) for each in given):
        pairs = [_pair(each) for each in given]
    else:
        pairs = [(step, _number(each)) for step, each in enumerate(given)]
    steps = [step for step, _ in pairs]
    if steps != sorted(set(steps)):
        raise BadRequest(f"loras: the steps of strengths are {steps}; they have to ascend")
    first = pairs.pop(0)[1] if not steps[0] else 0.0
    changes: list[StepStrength] = []
    last = first
    for step, strength in pairs:
        if strength != last:
            changes.append(StepStrength(step, strength))
        last = strength
    return first, tuple(changes)


def _pair(given: Any) -> tuple[int, float]:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise BadRequest(f"loras: strengths by step are numbers or pairs of a step and a number, not {given!r:.100}")
    step, strength = given
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < limits.MAX_STEPS:
        raise BadRequest(f"loras: the step {step!r:.100} of a strength is none from 0 to {limits.MAX_STEPS - 1}")
    return step, _number(strength)


def _number(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise BadRequest(
            f"loras: the strength {given!r:.100} is no number: give one, such as 0.8, or strengths by step"
        )
    if not -MAX_SCALE <= given <= MAX_SCALE:  # as NaN
        raise BadRequest(f"loras: the strength {given!r:.100} is not from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(given)
