"""Schedulers of clients: settings that diffusers' classes take, and fail with in the middle of a generation."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from xditd.gpu_workers.models import schedules
from xditd.gpu_workers.models.schedules import build_scheduler, tried
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import Schedule

EULER = "FlowMatchEulerDiscreteScheduler"
NEEDS_SCIPY = pytest.mark.skipif(not find_spec("scipy"), reason="diffusers does not install scipy")
UNIPC = "UniPCMultistepScheduler"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 3}


def steps_of(class_name: str, **settings: Any) -> Any:
    given = Schedule(class_name=class_name, settings=settings)

    def prepare() -> Any:
        scheduler = build_scheduler(given, {})
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(0)
        return scheduler

    return tried(given, prepare)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"final_sigmas_type": "x"}, "no steps can be run with it: `final_sigmas_type` must be"),
        ({"timestep_spacing": "x"}, "no steps can be run with it: x is not supported"),
        ({"predict_x0": False}, "no steps can be run with it: prediction_type given as flow_prediction"),
        ({"lower_order_final": False}, "no steps can be run with it: .*singular"),
        ({"lower_order_final": False, "solver_order": 2}, "its steps give NaN"),
        ({"solver_type": "bh1"}, "its steps give NaN"),
        pytest.param({"use_beta_sigmas": True}, "its steps give NaN", marks=NEEDS_SCIPY),
    ],
)
def test_settings_that_fail_in_the_last_step_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=f"scheduler {UNIPC} with .*{says}"):
        steps_of(UNIPC, **{**FLOW, **changed})


def test_a_scheduler_that_was_tried_begins_at_its_first_step() -> None:
    for class_name, settings in ((UNIPC, FLOW), (EULER, {"shift": 3.0})):
        found = steps_of(class_name, **settings)
        assert len(found.timesteps) == 3
        assert found.step_index is None
        assert not any(getattr(found, "model_outputs", ()))


def test_what_fails_before_the_steps_is_refused() -> None:
    def divide() -> Any:
        raise ZeroDivisionError("float division by zero")

    with pytest.raises(BadRequest, match=r"base_image_seq_len.*float division by zero"):
        tried(Schedule(class_name=EULER, settings={"base_image_seq_len": 4096}), divide)
    with pytest.raises(ZeroDivisionError):  # of our own, a fault of ours
        tried(None, divide)


def test_steps_that_passed_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    step = UniPCMultistepScheduler.step

    def counted(self: Any, *given: Any, **more: Any) -> Any:
        runs.append("step")
        return step(self, *given, **more)

    monkeypatch.setattr(schedules, "_passed", {})
    monkeypatch.setattr(UniPCMultistepScheduler, "step", counted)
    first = steps_of(UNIPC, **FLOW)
    assert len(runs) == 3
    again = steps_of(UNIPC, **FLOW)
    assert len(runs) == 3
    assert torch.equal(first.sigmas, again.sigmas)
    assert again.step_index is None
    steps_of(UNIPC, **{**FLOW, "flow_shift": 3.0000001})
    assert len(runs) == 6
    steps_of(UNIPC, **{**FLOW, "solver_order": 2})  # with the same timesteps
    assert len(runs) == 9
    for _ in range(2):  # what fails is refused by every job
        with pytest.raises(BadRequest, match="its steps give NaN"):
            steps_of(UNIPC, **{**FLOW, "solver_type": "bh1"})
    assert len(runs) == 15
    for number in range(2 * schedules._PASSED_AT_MOST):
        steps_of(EULER, shift=1.0 + number)
    assert len(schedules._passed) == schedules._PASSED_AT_MOST
