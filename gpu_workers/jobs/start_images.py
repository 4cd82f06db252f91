"""The image that a generation starts from, and the mask of what is made anew, as diffusers' pipelines have them.

Latents are set to those of the image where the mask keeps it, with the noise of the next step, after each step.

Source: diffusers, ``pipeline_flux_img2img.py``, ``pipeline_flux_inpaint.py`` and those of Qwen-Image and Z-Image, which
agree; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xditd.gpu_workers.jobs.context import JobContext
from xditd.gpu_workers.jobs.controls import Noise, encode_sample, for_batch
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.finite import check_finite
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.gpu_workers.models.operations import DenoisingRun, Recipe, Wanted
from xditd.gpu_workers.models.picture_recipes import Sampled, SampledRecipe, StartedRun, whole_mask
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import TransformerFacts
from xditd.ipc.requests import Generate


@dataclass(frozen=True, eq=False)
class Start:
    """The latents of the image (batch, channels, h, w), and the mask (batch, 1, h, w); steps run from ``first``."""

    latents: torch.Tensor
    mask: torch.Tensor | None
    first: int


@dataclass(frozen=True, eq=False)
class StartedFrom:
    """A start on the way: everything as steps take it."""

    image: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None
    first: int

    @classmethod
    def of(cls, start: Start, started: DenoisingRun) -> StartedFrom:
        if not isinstance(started, StartedRun):
            raise Unsupported("start_image: this family's steps start from noise alone; leave it out")
        mask = start.mask
        if mask is not None:
            mask = started.packed(mask.expand(-1, start.latents.shape[1], -1, -1))
        started.scheduler.set_begin_index(start.first)
        return cls(started.packed(start.latents), started.latents, mask, start.first)

    def latents(self, scheduler: Any) -> torch.Tensor:
        """Return the first latents: those of the image with the noise of the first step."""
        return self._noised(scheduler, self.first)

    def kept(self, latents: torch.Tensor, scheduler: Any, step: int) -> torch.Tensor:
        """Return the latents after a step, with those of the image where the mask keeps it."""
        if self.mask is None:
            return latents
        image = self._noised(scheduler, step + 1) if step + 1 < len(scheduler.timesteps) else self.image
        return (1 - self.mask) * image + self.mask * latents

    def _noised(self, scheduler: Any, step: int) -> torch.Tensor:
        timesteps = scheduler.timesteps[step : step + 1].expand(self.image.shape[0])
        noised: torch.Tensor = scheduler.scale_noise(self.image, timesteps, self.noise)
        return noised


def first_step(steps: int, strength: float) -> int:
    """Return the first of ``steps`` that runs with this strength, by the rule of diffusers' pipelines."""
    return int(max(steps - min(steps * strength, steps), 0))


def read_start(
    job: Generate,
    vae: Component | None,
    wanted: Wanted,
    facts: TransformerFacts,
    context: JobContext,
    io: OpenIo,
    draw: Noise | None,
) -> Start | None:
    """Read the image and the mask, and encode the image, on every rank; ``None`` without an image.

    The image's latents are a sample of the VAE's distribution with the noise that ``draw`` gives, or its mode without.

    Raises:
        BadRequest: a wrong size, a mask or a strength without an image, no VAE, or a strength that leaves no step.
        Unsupported: the family starts from noise alone, or a VAE that draws no samples.
    """
    strength = job.sampling.strength
    if job.start_image is None:
        if job.start_mask is not None or strength != 1.0:
            what = "start_mask" if job.start_mask is not None else f"strength {strength:g}"
            raise BadRequest(f"{what} without start_image would have no effect: give the image, or leave it out")
        return None
    for what, given in (("image", job.start_image), ("mask", job.start_mask)):
        if given is not None and what not in facts.starts:
            raise Unsupported(f"start_{what}: this transformer's generations take none; leave it out")
    if job.controls:
        raise Unsupported("start_image beside controls: generations take one of both; leave the other out")
    if "transformer_2" in job.components:
        raise Unsupported("start_image: a generation with two transformers takes none; leave it out")
    first = first_step(wanted.steps, strength)
    if first >= wanted.steps:
        raise BadRequest(
            f"strength {strength:g} of {wanted.steps} steps leaves none to run; use at least {1 / wanted.steps:.3g}"
        )
    place, latents_facts = "start_image", facts.latents
    image = io.read(place, job.start_image, context.device)
    latents = encode_sample(place, image, vae, wanted, latents_facts.scaling, draw, is_picture=True)
    latents = for_batch(place, latents, wanted.batch)
    check_finite({f"{place}: its latents": latents})
    mask = None
    if job.start_mask is not None:
        mask = io.read("start_mask", job.start_mask, context.device)
        check_shape("start_mask", mask, (None, 1, wanted.height, wanted.width))
        check_finite({"start_mask": mask})
        least, most = torch.stack(mask.aminmax()).tolist()
        if not (least >= -0.01 and most <= 1.01):  # but for the rounding of a resize
            raise BadRequest(f"start_mask: values from {least:g} to {most:g}, use 0 to 1")
        size = latents.shape[-2:]
        mask = torch.nn.functional.interpolate(whole_mask(mask.float()), size=tuple(size))
        mask = for_batch("start_mask", mask, wanted.batch)
    return Start(latents, mask, first)


def sampled_of(recipe: Recipe[Any], config: Any, wanted: Wanted, conditioning: Mapping[str, Any]) -> Sampled:
    """Return the pictures of which the VAE gives samples; none for families that take none."""
    return recipe.sampled(config, wanted, conditioning) if isinstance(recipe, SampledRecipe) else Sampled()


def encode_sampled(
    pictures: Mapping[str, torch.Tensor],
    vae: Component | None,
    wanted: Wanted,
    facts: TransformerFacts,
    draw: Noise | None,
) -> dict[str, torch.Tensor]:
    """Encode pictures on every rank, one row for each of the batch in the result."""
    found: dict[str, torch.Tensor] = {}
    for name, picture in pictures.items():
        latents = encode_sample(name, picture, vae, wanted, facts.latents.scaling, draw)
        check_finite({f"{name}: its latents": latents})
        found[name] = for_batch(name, latents, wanted.batch)
    return found


def skip_drawn(sampled: Sampled, wanted: Wanted, facts: TransformerFacts, draw: Noise | None) -> None:
    """Draw the noise of pictures that have no effect."""
    if sampled.skipped and draw is not None and wanted.vae_dtype is not None:
        draw(facts.latents.shape(sampled.skipped, wanted.height, wanted.width), wanted.vae_dtype)
