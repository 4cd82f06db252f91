"""A whole generation in stages, as ``pipelines.generate`` runs it where the layout says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from xditd.gpu_workers.pipefusion.flux1 import StagedFlux1
from xditd.gpu_workers.pipefusion.links import StageLinks
from xditd.gpu_workers.pipefusion.sampling import Inputs, sample
from xditd.gpu_workers.result_checks import FiniteCheck
from xditd.gpu_workers.skeletons import Skeleton


def generate(
    skeleton: Skeleton,
    inputs: Inputs,
    schedule: Mapping[str, object],
    *,
    steps: int,
    sigmas: Sequence[float] | None,
    on_step: Callable[[int, int], None] | None,
    on_denoised: Callable[[torch.Tensor], None] | None,
    finite: FiniteCheck | None,
) -> torch.Tensor:
    """Run a checked job; see :func:`sample`.

    ``schedule`` are arguments of diffusers' scheduler, for ``steps`` of its own sigmas unless ``sigmas`` are given.
    """
    layout = skeleton.layout
    return sample(
        cast(StagedFlux1, skeleton.module),
        StageLinks(layout.device, in_flight=layout.patches),
        inputs,
        schedule_of(schedule, steps=steps, sigmas=sigmas, image_tokens=inputs.noise.shape[1], device=layout.device),
        patches=layout.patches,
        warm_up_steps=layout.patching.warm_up_steps,
        on_step=on_step,
        on_denoised=on_denoised,
        finite=finite,
    )


def schedule_of(
    schedule: Mapping[str, object],
    *,
    steps: int,
    sigmas: Sequence[float] | None,
    image_tokens: int,
    device: torch.device,
) -> FlowMatchEulerDiscreteScheduler:
    """Return diffusers' scheduler with its timesteps set as FluxPipeline sets them for so many image tokens."""
    made = FlowMatchEulerDiscreteScheduler(**schedule)
    config = made.config
    shift = calculate_shift(
        image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    chosen = np.linspace(1.0, 1 / steps, steps) if sigmas is None else list(sigmas)
    made.set_timesteps(sigmas=chosen, device=device, mu=shift)
    return made
