"""The inputs of a ``Generate`` job: read from its messages, checked, and on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor

from xditd.gpu_workers.jobs.call import check_variant
from xditd.gpu_workers.jobs.context import JobContext
from xditd.gpu_workers.jobs.controls import GenerationControls, read_controls
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.pictures import noise_frames, pictures_of
from xditd.gpu_workers.jobs.reading import ArgumentReader, check_names
from xditd.gpu_workers.jobs.start_images import Start, encode_sampled, read_start, sampled_of, skip_drawn
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.finite import check_finite
from xditd.gpu_workers.models.job_checks import check_batch, check_output, check_schedule, check_sides, check_tensor
from xditd.gpu_workers.models.operations import Wanted
from xditd.gpu_workers.models.picture_recipes import StartRecipe
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import TransformerFacts
from xditd.ipc.job_parts import Sampling
from xditd.ipc.name_lists import listed
from xditd.ipc.requests import Generate


@dataclass(eq=False)
class Given:
    """The inputs of a generation, read and checked: its conditioning with ``pictures``, and its noise."""

    wanted: Wanted
    conditioning: Mapping[str, Any]
    noise: torch.Tensor
    reader: ArgumentReader
    pictures: Mapping[str, torch.Tensor]
    """What the VAE encodes, by name."""
    controls: GenerationControls
    latents: dict[str, torch.Tensor] = field(default_factory=dict)
    """The latents of the pictures, by the same names."""
    start: Start | None = None
    has_encoded: bool = False
    """Whether the VAE has encoded pictures of it already."""

    @classmethod
    def read(
        cls,
        job: Generate,
        context: JobContext,
        transformer: Component,
        io: OpenIo,
        vae: Component | None,
    ) -> Given:
        """Read and check all inputs, and encode the pictures of ControlNets.

        Raises:
            BadRequest: wrong sizes, shapes, steps, sigmas or options, or values that are not finite.
            Unsupported: the family has no step cache.
        """
        config, recipe = transformer.match.config, transformer.model.operations_for("transformer").recipe
        facts, sampling = transformer.transformer_facts, job.sampling
        check_variant(sampling.variant, facts)
        check_names(job.conditioning, facts.conditioning, "conditioning")
        if unknown := sorted(set(sampling.options) - set(facts.options)):
            taken = f"it takes {', '.join(facts.options)}" if facts.options else "it takes none"
            raise BadRequest(f"options: {listed(unknown)} cannot be given to {transformer.match.family.name}; {taken}")
        if sampling.step_cache_threshold > 0.0 and not facts.has_step_cache:
            raise Unsupported(f"step_cache: {transformer.match.family.name} has none; leave it at 0")
        if sampling.step_cache_threshold > 0.0 and job.controls:
            raise Unsupported("step_cache: it skips the blocks that the residuals of controls are for; leave it at 0")
        if "transformer_2" in job.components and job.controls:
            raise Unsupported("controls: a generation with two transformers takes none; leave them out")
        wanted = replace(
            to_wanted(sampling, job.out_latents.shape[0] if job.out_latents.shape else 0, facts),
            stages=2 if "transformer_2" in job.components else 1,
            vae_dtype=None if vae is None else vae.match.dtype,
        )
        recipe.check(config, wanted)
        shape = facts.latents.shape(wanted.batch, wanted.height, wanted.width, wanted.frames)
        io.check("out_latents", job.out_latents, shape)
        check_output("out_latents", job.out_latents.dtype)
        if job.out_denoised is not None:
            check_output("out_denoised", job.out_denoised.dtype)
            io.check("out_denoised", job.out_denoised, shape)
        reader = context.reader(io)
        conditioning = reader.read(job.conditioning).arguments
        pictures = pictures_of(recipe, config, wanted, conditioning)
        frames = noise_frames(recipe, wanted, conditioning)
        of_noise = facts.latents.shape(wanted.batch, wanted.height, wanted.width, frames)
        dtype = recipe.noise_dtype(transformer.match.dtype, sampling.variant)
        if job.start_image is not None and wanted.vae_dtype is not None and isinstance(recipe, StartRecipe):
            dtype = recipe.start_dtype(wanted.vae_dtype, sampling.variant)
        draw = None if sampling.seed is None or job.noise is not None else SeededNoise(sampling.seed)
        controls = read_controls(transformer, vae, job.controls, wanted, sorted(conditioning), context, io, draw)
        sampled = sampled_of(recipe, config, wanted, conditioning)
        latents = encode_sampled(sampled.before, vae, wanted, facts, draw)
        start = read_start(job, vae, wanted, facts, context, io, draw)
        skip_drawn(sampled, wanted, facts, draw)
        if job.noise is not None:
            given = io.read("noise", job.noise, context.device)
            check_tensor("noise", given, of_noise)
            noise = given.to(dtype)
            check_finite({"noise": noise})
        elif draw is not None:
            noise = draw(of_noise, dtype).to(context.device)
        else:
            raise BadRequest("generate: neither noise nor a seed; give one of them")
        latents |= encode_sampled(sampled.after, vae, wanted, facts, draw)
        if start is not None:
            start = replace(
                start, latents=start.latents.to(dtype), mask=None if start.mask is None else start.mask.to(dtype)
            )
        has_encoded = bool(sampled.names) or start is not None or controls.has_images
        return cls(wanted, conditioning, noise, reader, pictures, controls, latents, start, has_encoded)


def to_wanted(sampling: Sampling, batch: int, facts: TransformerFacts) -> Wanted:
    """Check the numbers of a generation, and fill in the family's defaults.

    Raises:
        BadRequest: names the field, its value and what is accepted.
    """
    check_batch("out_latents", batch)
    check_sides(sampling.height, sampling.width, facts.latents.pixels * facts.latents.multiple)
    facts.latents.check_frames(sampling.frames)
    check_schedule(sampling.steps, sampling.sigmas)
    scale = sampling.guidance_scale
    return Wanted(
        batch=batch,
        height=sampling.height,
        width=sampling.width,
        steps=sampling.steps,
        guidance_scale=facts.default_guidance_scale if scale is None else scale,
        sigmas=sampling.sigmas,
        variant=sampling.variant,
        options=sampling.options,
        frames=sampling.frames,
        schedule=sampling.schedule,
    )


class SeededNoise:
    """Draws, one after the other, what a diffusers pipeline draws for ``torch.Generator("cpu").manual_seed(seed)``.

    On the CPU; the same on every machine.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        drawn = randn_tensor(shape, generator=self._generator, device=torch.device("cpu"), dtype=dtype)
        return cast(torch.Tensor, drawn)


def seeded_noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the first noise that a diffusers pipeline draws for a seed, unpacked."""
    return SeededNoise(seed)(shape, dtype)
