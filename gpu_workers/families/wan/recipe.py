"""Sampling videos with Wan as diffusers' ``WanPipeline`` and ``WanImageToVideoPipeline`` do it, with the same bits.

Latents are float32, unlike the weights. Of Wan 2.2 A14B, one transformer predicts at times from ``boundary_ratio`` on,
another below. TI2V 5B takes a time for each token, which is 0 for those of a first image.

Sources: diffusers, ``pipelines/wan/pipeline_wan.py`` and ``pipeline_wan_i2v.py``; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from xditd.gpu_workers.families.wan.checks import check_split, check_texts
from xditd.gpu_workers.families.wan.config import PATCH, TIMESTEPS, WanConfig
from xditd.gpu_workers.families.wan.facts import (
    BOUNDARY,
    EULER,
    NEGATIVE,
    PROMPT,
    SECOND_SCALE,
    SHIFT,
)
from xditd.gpu_workers.families.wan.pictures import (
    Condition,
    FirstFrame,
    condition_of,
    image_states,
    of_each_row,
    videos_of,
)
from xditd.gpu_workers.models.job_checks import prepare
from xditd.gpu_workers.models.operations import Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.models.schedules import EULER as ONLY_EULER
from xditd.gpu_workers.models.schedules import EULER_OR_UNIPC, build_scheduler, check_schedule, tried
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.job_parts import Schedule

EULER_SCHEDULE: Final = Schedule(class_name="FlowMatchEulerDiscreteScheduler")
UNIPC_SCHEDULE: Final = Schedule(
    class_name="UniPCMultistepScheduler",
    settings={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": TIMESTEPS},
)
"""The scheduler beside the weights of every release."""
_IMAGE: Final = "encoder_hidden_states_image"
LIMITS: Final = {SHIFT: (0.01, 100.0), BOUNDARY: (0.0, 1.0), SECOND_SCALE: (0.0, 1000.0)}


class WanRecipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    limits: Mapping[str, tuple[float, float]] = LIMITS
    """The least and the greatest value of each option that is a number."""

    def check(self, config: WanConfig, wanted: Wanted) -> None:
        check_schedule(wanted.schedule, EULER_OR_UNIPC)
        for name, (low, high) in self.limits.items():
            value = wanted.options.get(name)
            if value is not None and (isinstance(value, bool) or not low <= value <= high):
                raise BadRequest(f"options: {name}={value!r} is not a number from {low:g} to {high:g}")
        euler = wanted.options.get(EULER, False)
        if not isinstance(euler, bool):
            raise BadRequest(f"options: {EULER}={euler!r} is not True or False")
        if (schedule := wanted.schedule) is not None:
            if wanted.sigmas is not None:
                raise BadRequest(
                    "sigmas beside a scheduler: the pipelines of videos take none, and used as they are they have no "
                    "shift; give one of both"
                )
            if EULER in wanted.options and euler != (schedule.class_name in ONLY_EULER):
                raise BadRequest(f"options: {EULER}={euler} beside a scheduler {schedule.class_name}: leave one out")
            if schedule.settings.get("use_dynamic_shifting", False):
                raise Unsupported(
                    "scheduler: use_dynamic_shifting=True has no shift in the pipelines of videos; set it to False"
                )
        if wanted.stages == 1 and (given := sorted({BOUNDARY, SECOND_SCALE} & set(wanted.options))):
            raise BadRequest(f"options: {given[0]} without a second transformer would have no effect: leave it out")
        if SECOND_SCALE in wanted.options and wanted.guidance_scale <= 1:
            raise BadRequest(
                f"options: {SECOND_SCALE} with guidance_scale {wanted.guidance_scale:g} would have no effect, since "
                "diffusers guides both transformers or none: leave it out, or guide with more than 1"
            )
        if wanted.sigmas is not None and SHIFT in wanted.options:
            raise BadRequest(f"options: {SHIFT} with sigmas would have no effect, they are used as they are")

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return torch.float32

    def pictures(
        self, config: WanConfig, wanted: Wanted, conditioning: Mapping[str, Any]
    ) -> Mapping[str, torch.Tensor]:
        return videos_of(wanted, conditioning, config)

    def noise_frames(self, wanted: Wanted, conditioning: Mapping[str, Any]) -> int:
        return wanted.frames

    def conditions(
        self, model: Model[WanConfig], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], Condition | None]:
        """Return the arguments of all forwards besides texts, and how steps take latents of pictures.

        Raises:
            BadRequest: a wrong shape; names it and what is accepted.
        """
        config = model.config
        fixed: dict[str, torch.Tensor] = {}
        if states := image_states(config, conditioning, wanted.batch):
            (prepared,) = prepare(model, **states)
            fixed[_IMAGE] = of_each_row(prepared, config.images, wanted.batch)
        return fixed, condition_of(config, conditioning, noise)

    def start(
        self, model: Model[WanConfig], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> WanRun:
        config = model.config
        texts = _texts(conditioning, wanted)
        tokens = noise.shape[2:].numel() // (PATCH[0] * PATCH[1] * PATCH[2])
        for name, each in texts.items():
            check_texts(name, each, wanted.batch, config, None)
        check_split(model.layout, tokens)
        fixed, condition = self.conditions(model, wanted, conditioning, noise)
        embeds = prepare(model, **texts)
        scheduler = tried(wanted.schedule, lambda: _scheduled(config, wanted, model.device))
        boundary = wanted.options.get(BOUNDARY, config.default_boundary) * TIMESTEPS
        known = tuple(float(each) for each in scheduler.timesteps.tolist())
        stages = tuple(int(wanted.stages == 2 and each < boundary) for each in known)
        second = wanted.options.get(SECOND_SCALE, wanted.guidance_scale)
        return WanRun(
            scheduler=scheduler,
            latents=noise,
            foreseen={"timestep": known},
            texts=embeds,
            fixed=fixed,
            condition=condition,
            stages=stages,
            scales=(wanted.guidance_scale, second),
            dtype=model.dtype,
            token_times=_token_times(condition, tokens, noise) if config.has_time_per_token else None,
        )


@dataclass(frozen=True, eq=False)
class WanRun:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`."""

    scheduler: Any
    latents: torch.Tensor
    foreseen: Mapping[str, tuple[float, ...]]
    """The model's timestep at each step."""
    texts: Sequence[torch.Tensor]
    """The embeddings of the prompts, then, with guidance, of the negative prompts."""
    fixed: Mapping[str, torch.Tensor]
    """Arguments of all forwards, the same in all steps."""
    condition: Condition | None
    """How steps take the latents of images."""
    stages: Sequence[int]
    """Of each step: 0 is the first transformer, 1 the second."""
    scales: tuple[float, float]
    """The guidance scale of each stage."""
    dtype: torch.dtype
    """Of the weights."""
    token_times: torch.Tensor | None
    """(tokens,): 1, or 0 of tokens at time 0, if each token has a time of its own."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        batch = latents.shape[0]
        time = self.scheduler.timesteps[step]
        if self.token_times is not None:
            timestep, known = (self.token_times * time).unsqueeze(0).expand(batch, -1), {}
        else:
            timestep, known = time.expand(batch), {"timestep": (self.foreseen["timestep"][step],) * batch}
        video = latents if self.condition is None else self.condition.joined(latents)
        moving = {"hidden_states": video.to(self.dtype), "timestep": timestep}
        return [Inputs({**moving, "encoder_hidden_states": each, **self.fixed}, known) for each in self.texts]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        """Combine the predictions, in the weights' dtype: the schedulers round by it."""
        found = [each if isinstance(each, torch.Tensor) else torch.stack(each) for each in rows]
        if len(found) == 1:
            return found[0]
        positive, negative = found
        return negative + self.scales[self.stages[step]] * (positive - negative)

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents if self.condition is None else self.condition.finished(latents)


def _token_times(condition: Condition | None, tokens: int, noise: torch.Tensor) -> torch.Tensor:
    if isinstance(condition, FirstFrame):
        return condition.of_tokens
    return torch.ones(tokens, dtype=torch.float32, device=noise.device)


def _texts(conditioning: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Return the embeddings of the prompts, and of the negatives where they are needed.

    Raises:
        BadRequest: they are missing, or would have no effect.
    """
    negative = conditioning.get(NEGATIVE)
    if wanted.guidance_scale <= 1:
        if negative is not None:
            raise BadRequest(
                f"{NEGATIVE} with guidance_scale {wanted.guidance_scale:g} would have no effect: leave it out, or "
                "guide with more than 1"
            )
        return {PROMPT: conditioning[PROMPT]}
    if negative is None:
        raise BadRequest(
            f"{NEGATIVE} is missing: guidance_scale {wanted.guidance_scale:g} needs one for each video, the empty "
            "text's if there is none; distilled weights run with guidance_scale 1"
        )
    return {PROMPT: conditioning[PROMPT], NEGATIVE: negative}


def _scheduled(config: WanConfig, wanted: Wanted, device: torch.device) -> Any:
    """Set the timesteps: the schedule with its shift, or given sigmas without one."""
    given = wanted.sigmas
    shift = 1.0 if given is not None else wanted.options.get(SHIFT, config.default_shift)
    schedule = wanted.schedule
    if schedule is None:
        schedule = EULER_SCHEDULE if wanted.options.get(EULER, False) else UNIPC_SCHEDULE
    is_euler = schedule.class_name in ONLY_EULER
    name = "shift" if is_euler else "flow_shift"
    is_own = wanted.schedule is not None and SHIFT not in wanted.options
    scheduler = build_scheduler(schedule, {} if is_own else {name: shift})
    if is_euler:
        if given is None:
            scheduler.set_timesteps(wanted.steps, device=device)
        else:
            scheduler.set_timesteps(sigmas=list(given), device=device)
    else:
        scheduler.set_timesteps(wanted.steps, device=device, sigmas=None if given is None else np.array(given))
    scheduler.set_begin_index(0)
    return scheduler
