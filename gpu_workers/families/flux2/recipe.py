"""Sampling with FLUX.2 as diffusers' ``Flux2Pipeline`` and ``Flux2KleinPipeline`` do it, with the same bits.

dev takes the guidance scale as an input. klein has none: above 1, ``negative + scale * (positive - negative)``, which
is meant for its base; the distilled weights run without (scale 1).

Source: diffusers, ``pipelines/flux2/pipeline_flux2.py`` and ``pipeline_flux2_klein.py``; a test compares the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps

from xditd.gpu_workers.families.flux2.checks import check_split
from xditd.gpu_workers.families.flux2.config import PIXELS_PER_LATENT, SCHEDULER, Flux2Config
from xditd.gpu_workers.families.flux2.facts import FLOAT32_TIME, NEGATIVE, PROMPT
from xditd.gpu_workers.models.job_checks import check_shape, prepare
from xditd.gpu_workers.models.operations import Inputs, Model, RowResults, Wanted
from xditd.ipc.errors import BadRequest

TRAINED_TIMESTEPS = 1000


class Flux2Recipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: Flux2Config, wanted: Wanted) -> None:
        """There are no settings beyond those of every family."""

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return torch.float32 if variant == FLOAT32_TIME else dtype

    def start(
        self, model: Model[Flux2Config], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> Flux2Run:
        config = model.config
        is_guided = not config.has_guidance and wanted.guidance_scale > 1
        texts = _texts(conditioning, wanted, is_guided=is_guided)
        rows, columns = (side // PIXELS_PER_LATENT for side in (wanted.height, wanted.width))
        for name, each in texts.items():
            check_shape(name, each, (wanted.batch, None, config.context_channels))
            check_split(model.layout, each.shape[1], rows * columns)
        embeds = prepare(model, **texts)
        latents = Flux2Pipeline._pack_latents(noise.contiguous())
        scheduler = _scheduled(wanted, latents.shape[1], model.device)
        timesteps = scheduler.timesteps.to(latents.dtype) / TRAINED_TIMESTEPS
        guidance = torch.full([1], wanted.guidance_scale, device=model.device, dtype=torch.float32)
        fixed = [
            {
                "encoder_hidden_states": each,
                "txt_ids": Flux2Pipeline._prepare_text_ids(each[:1])[0].to(model.device),
                "img_ids": Flux2Pipeline._prepare_latent_ids(noise[:1])[0].to(model.device),
                "guidance": guidance.expand(wanted.batch) if config.has_guidance else None,
            }
            for each in embeds
        ]
        return Flux2Run(
            scheduler=scheduler,
            latents=latents,
            timesteps=timesteps,
            foreseen={"timestep": tuple(timesteps.tolist())},
            fixed=fixed,
            known={"guidance": (wanted.guidance_scale,) * wanted.batch} if config.has_guidance else {},
            guidance_scale=wanted.guidance_scale,
            dtype=model.dtype,
            size=(rows, columns),
        )


@dataclass(frozen=True, eq=False)
class Flux2Run:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`. Latents are packed, (batch, tokens, 128)."""

    scheduler: FlowMatchEulerDiscreteScheduler
    latents: torch.Tensor
    timesteps: torch.Tensor
    """The model's timestep at each step, (steps,)."""
    foreseen: Mapping[str, tuple[float, ...]]
    fixed: Sequence[Mapping[str, Any]]
    """The arguments of each forward of a step that do not change between steps: of the prompts, then the negatives."""
    known: Mapping[str, tuple[float, ...]]
    guidance_scale: float
    dtype: torch.dtype
    """Of the weights."""
    size: tuple[int, int]
    """Rows and columns of tokens."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        batch = latents.shape[0]
        moving = {"hidden_states": latents.to(self.dtype), "timestep": self.timesteps[step].expand(batch)}
        known = {"timestep": (self.foreseen["timestep"][step],) * batch, **self.known}
        return [Inputs({**moving, **fixed}, known) for fixed in self.fixed]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        found = [each if isinstance(each, torch.Tensor) else torch.stack(each) for each in rows]
        if len(found) == 1:
            return found[0].to(latents.dtype)
        positive, negative = found
        return (negative + self.guidance_scale * (positive - negative)).to(latents.dtype)

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2).unflatten(2, self.size)


def _texts(conditioning: Mapping[str, Any], wanted: Wanted, *, is_guided: bool) -> dict[str, Any]:
    """Return the embeddings of the prompts, and of the negatives where they are needed.

    Raises:
        BadRequest: they are missing, or would have no effect.
    """
    negative = conditioning.get(NEGATIVE)
    if not is_guided:
        if negative is not None:
            raise BadRequest(
                f"{NEGATIVE} with guidance_scale {wanted.guidance_scale:g} would have no effect: leave it out, or "
                "guide with more than 1 (klein's base: 4)"
            )
        return {PROMPT: conditioning[PROMPT]}
    if negative is None:
        raise BadRequest(
            f"{NEGATIVE} is missing: guidance_scale {wanted.guidance_scale:g} needs one for each image; klein's "
            "distilled weights run with guidance_scale 1"
        )
    return {PROMPT: conditioning[PROMPT], NEGATIVE: negative}


def _scheduled(wanted: Wanted, image_tokens: int, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """Set the timesteps: the model's own schedule, or given sigmas without a shift."""
    given = wanted.sigmas
    settings = SCHEDULER if given is None else {"shift": 1.0, "use_dynamic_shifting": False}
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    sigmas = np.linspace(1.0, 1 / wanted.steps, wanted.steps) if given is None else list(given)
    mu = compute_empirical_mu(image_tokens, wanted.steps)
    retrieve_timesteps(scheduler, wanted.steps, device, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler
