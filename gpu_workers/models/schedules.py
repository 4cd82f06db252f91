"""Schedulers of diffusers in a generation: the family's own, or the one whose settings the client sends.

A client that opens a pipeline's folder sends what its ``scheduler_config.json`` says, so that the steps are those of
diffusers' pipeline with that folder. What a loop without the pipeline cannot do is refused by its name and value.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.job_parts import Schedule
from xditd.ipc.name_lists import listed
from xditd.ipc.suggestions import did_you_mean

TRAINED_TIMESTEPS: Final = 1000

_CLASSES: Final[Mapping[str, Any]] = {
    each.__name__: each for each in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)
}
_ONLY: Final[Mapping[str, Mapping[str, object]]] = {
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": TRAINED_TIMESTEPS,
        "invert_sigmas": False,
        "stochastic_sampling": False,
    },
    "UniPCMultistepScheduler": {
        "num_train_timesteps": TRAINED_TIMESTEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "trained_betas": None,
        "solver_p": None,
        "use_dynamic_shifting": False,
    },
}
"""The one value of a setting with which the loop does what diffusers' pipelines do."""


def check_schedule(given: Schedule | None, classes: tuple[str, ...]) -> None:
    """Check the scheduler of a generation, for a family that runs ``classes``.

    Raises:
        Unsupported: another class, or a setting that the loop cannot obey; names it and its value.
        BadRequest: a setting that the class does not have, or a value that it refuses.
    """
    if given is None:
        return
    if given.class_name not in classes:
        raise Unsupported(
            f"scheduler {given.class_name}: this model runs with {listed(classes)}; use one of their configurations"
        )
    known = list(inspect.signature(_CLASSES[given.class_name].__init__).parameters)[1:]
    for name, value in given.settings.items():
        if name not in known:
            raise BadRequest(
                f"scheduler: {name}={value!r} is no setting of {given.class_name}; leave it out"
                f"{did_you_mean(name, known)}"
            )
    defaults = inspect.signature(_CLASSES[given.class_name].__init__).parameters
    for name, wanted in _ONLY[given.class_name].items():
        value = given.settings.get(name, defaults[name].default)
        if value != wanted:
            raise Unsupported(f"scheduler: {name}={value!r} of {given.class_name} cannot be run, {wanted!r} can")
    build_scheduler(given, {})


def build_scheduler(given: Schedule, changed: Mapping[str, Any]) -> Any:
    """Return the scheduler with its settings, of which ``changed`` replaces some.

    Raises:
        BadRequest: a value that the class refuses.
        Unsupported: one that needs a package that is not installed.
    """
    settings = {**given.settings, **changed}
    try:
        return _CLASSES[given.class_name](**settings)
    except ImportError as error:
        raise Unsupported(f"scheduler {given.class_name} with {settings}: {error}") from error
    except (TypeError, ValueError, NotImplementedError, AssertionError) as error:
        raise BadRequest(f"scheduler {given.class_name} with {settings}: {error}") from error


_REFUSALS: Final = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError,
    torch.linalg.LinAlgError,
)  # fmt: skip
"""What diffusers' schedulers raise in the middle of a generation for settings that they had taken."""


def tried(given: Schedule | None, prepare: Callable[[], Any]) -> Any:
    """Return the scheduler that ``prepare`` builds, with its timesteps set.

    Settings of the client's are tried first: all steps are run on one number, because some settings fail in the
    last step alone. Steps that passed are not run again by later jobs of the same settings and timesteps.

    Raises:
        BadRequest: they fail, or give no finite number; names the settings.
    """
    if given is None:
        return prepare()
    try:
        scheduler = prepare()
        is_finite = _is_finite(scheduler)
    except _REFUSALS as error:
        raise BadRequest(f"{_described(given)}: no steps can be run with it: {error}") from error
    if not is_finite:
        raise BadRequest(f"{_described(given)}: its steps give NaN or infinite numbers; use the model's own settings")
    return scheduler


def _described(given: Schedule) -> str:
    return f"scheduler {given.class_name} with {dict(given.settings)!s:.1000}"


_PASSED_AT_MOST: Final = 64

_passed: dict[tuple[Hashable, ...], None] = {}
"""The settings and timesteps that passed, oldest first: a trial of 50 steps of UniPC takes 60 ms on every rank."""


def _is_finite(scheduler: Any) -> bool:
    """Run all steps on the CPU, on one number, by a copy, unless they have passed before."""
    key = _all_that_steps_read(scheduler)
    if key in _passed:
        return True
    trial = copy.deepcopy(scheduler)
    trial.timesteps, trial.sigmas = trial.timesteps.cpu(), trial.sigmas.cpu()
    sample, output = torch.full((1, 1, 1, 1), 0.5), torch.ones(1, 1, 1, 1)
    for time in trial.timesteps:
        sample = trial.step(output, time, sample, return_dict=False)[0]
    is_finite = bool(torch.isfinite(sample).all())
    if is_finite:
        while len(_passed) >= _PASSED_AT_MOST:
            del _passed[next(iter(_passed))]
        _passed[key] = None
    return is_finite


def _all_that_steps_read(scheduler: Any) -> tuple[Hashable, ...]:
    """Return what distinguishes a scheduler, whose timesteps are set, from others: tensors by their bytes."""
    tensors = (scheduler.timesteps, scheduler.sigmas)
    values = [(str(each.dtype), each.cpu().numpy().tobytes()) for each in tensors]
    return type(scheduler), repr(sorted(scheduler.config.items())), scheduler.begin_index, *values


def euler(given: Schedule | None, own: Mapping[str, Any], changed: Mapping[str, Any] | None = None) -> Any:
    """Return the Euler scheduler of a generation: the client's, or the family's ``own`` settings."""
    schedule = Schedule(class_name="FlowMatchEulerDiscreteScheduler", settings=dict(own)) if given is None else given
    return build_scheduler(schedule, changed or {})


EULER: Final = ("FlowMatchEulerDiscreteScheduler",)
EULER_OR_UNIPC: Final = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
