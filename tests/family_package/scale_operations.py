"""What jobs do with a scale: ``forward(sample, prompt)`` is ``sample * scale + prompt``, channel by channel.

``times`` repeats that along the width: results are as many times as large as the sample, for which room was offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.job_checks import check_shape, check_tensor, prepare
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

PIXELS = 8
SCALING = LatentScaling(factor=1.5305, shift=0.0609)
"""SD3's, whose VAE looks like FLUX.1's."""


class Scale(torch.nn.Module):
    """The model: ``scale`` is (channels,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(channels))

    def forward(self, sample: torch.Tensor, prompt: torch.Tensor, times: int = 1) -> torch.Tensor:
        """Take (rows, channels, height, width) and (rows, channels); give (rows, channels, height, times * width)."""
        scaled = sample * self.scale[:, None, None] + prompt[:, :, None, None]
        return scaled if times == 1 else scaled.repeat(1, 1, 1, times)


@dataclass(frozen=True, eq=False)
class ScaleRun:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`."""

    scheduler: FlowMatchEulerDiscreteScheduler
    latents: torch.Tensor
    prompt: torch.Tensor
    foreseen: Mapping[str, tuple[float, ...]]

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        return [Inputs({"sample": latents, "prompt": self.prompt})]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        (result,) = rows
        return result if isinstance(result, torch.Tensor) else torch.stack(result)

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class ScaleRecipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: int, wanted: Wanted) -> None:
        pass

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return dtype

    def start(
        self, model: Model[int], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> ScaleRun:
        check_shape("prompt", conditioning["prompt"], (wanted.batch, model.config))
        (prompt,) = prepare(model, prompt=conditioning["prompt"])
        scheduler = FlowMatchEulerDiscreteScheduler()
        sigmas = np.linspace(1.0, 1 / wanted.steps, wanted.steps) if wanted.sigmas is None else list(wanted.sigmas)
        scheduler.set_timesteps(sigmas=sigmas, device=model.device)
        return ScaleRun(scheduler, noise, prompt, {})


class ScaleOperations:
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    recipe = ScaleRecipe()

    def build(self, config: int) -> torch.nn.Module:
        return Scale(config)

    def fuse(self, *_: object) -> None:
        """There is no faster forward."""

    def facts(self, config: int, layout: ParallelLayout) -> TransformerFacts:
        return TransformerFacts(
            heads=0,
            ulysses=layout.degrees.ulysses,
            ring=layout.degrees.ring,
            arguments=(
                ArgumentFacts(name="sample", shape=("rows", config, "height", "width")),
                ArgumentFacts(name="prompt", shape=("rows", config)),
                ArgumentFacts(name="times", shape=(), is_needed=False),
            ),
            variants=("class",),
            conditioning=(ArgumentFacts(name="prompt", shape=("batch", config)),),
            latents=LatentFacts(channels=config, pixels=PIXELS, scaling=SCALING),
            guidance="none",
            default_guidance_scale=1.0,
            default_steps=4,
        )

    def check(self, model: Model[int], inputs: Inputs) -> None:
        sample = inputs.arguments["sample"]
        check_tensor("sample", sample, (None, model.config, None, None), model.dtype)
        check_tensor("prompt", inputs.arguments["prompt"], (sample.shape[0], model.config), model.dtype)
        times = inputs.arguments.get("times", 1)
        if type(times) is not int or times < 1:
            raise BadRequest(f"times: {times!r}, use a whole number above 0")

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        rows, channels, height, width = inputs.arguments["sample"].shape
        return ((channels, height, width * inputs.arguments.get("times", 1)),) * rows

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        arguments = inputs.arguments.items()
        return Inputs({name: each[rows] if isinstance(each, torch.Tensor) else each for name, each in arguments})

    def run(self, model: Model[int], inputs: Inputs, options: CallOptions) -> RowResults:
        result: torch.Tensor = model.module(**inputs.arguments)
        return result

    def tree(self, rows: RowResults) -> tuple[torch.Tensor]:
        return (rows if isinstance(rows, torch.Tensor) else torch.stack(rows),)
