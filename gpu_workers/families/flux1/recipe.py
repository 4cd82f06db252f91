"""Sampling with FLUX.1 as diffusers' ``FluxPipeline`` does it: schedule, arguments, packing.

Fill, Canny and Depth have further channels beside those of the latents, as in ``FluxFillPipeline`` and
``FluxControlPipeline``; Kontext has the tokens of a reference after those of the image, as in ``FluxKontextPipeline``.

Sources: diffusers, ``pipeline_flux.py``, ``pipeline_flux_fill.py``, ``pipeline_flux_control.py`` and
``pipeline_flux_kontext.py``; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from xditd.gpu_workers.families.flux1.config import (
    CONTROL_CHANNELS,
    FILL_CHANNELS,
    LATENT_CHANNELS,
    PATCH,
    PIXELS_PER_LATENT,
    Flux1Config,
)
from xditd.gpu_workers.families.flux1.facts import CONTROL, CONTROL_IMAGE, IMAGE, MASK, MASKED_IMAGE, REFERENCES
from xditd.gpu_workers.families.flux1.timesteps import SCALE, time_dtype
from xditd.gpu_workers.models.job_checks import check_shape, prepare
from xditd.gpu_workers.models.operations import Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.models.picture_recipes import Sampled, whole_mask
from xditd.gpu_workers.models.schedules import EULER, check_schedule, euler, tried
from xditd.gpu_workers.parallel.token_partition import partition_tokens
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_SIDE_PIXELS

_PICTURES: Final = {CONTROL_CHANNELS: (CONTROL, CONTROL_IMAGE), FILL_CHANNELS: (MASKED_IMAGE, IMAGE)}
"""Latents and the picture that is given in place of them, by input channels."""


class Flux1Recipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: Flux1Config, wanted: Wanted) -> None:
        check_schedule(wanted.schedule, EULER)

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return time_dtype(dtype, variant)

    def sampled(self, config: Flux1Config, wanted: Wanted, conditioning: Mapping[str, Any]) -> Sampled:
        """Return the pictures of Canny, Depth and Fill, which the pipelines sample: Fill's after the noise."""
        if config.in_channels not in _PICTURES:
            return Sampled()
        latents, picture = _PICTURES[config.in_channels]
        if (conditioning.get(latents) is None) == (conditioning.get(picture) is None):
            raise BadRequest(f"{picture}, {latents}: give either the picture or its latents")
        pixels = conditioning.get(picture)
        if pixels is None:
            return Sampled()
        check_shape(picture, pixels, (None, 3, wanted.height, wanted.width))
        if pixels.shape[0] not in (1, wanted.batch):
            raise BadRequest(
                f"{picture}: {pixels.shape[0]} for {wanted.batch} images: give one for each, or one for all"
            )
        if picture == CONTROL_IMAGE:
            return Sampled(before={latents: pixels.repeat_interleave(wanted.batch // pixels.shape[0], dim=0)})
        mask = conditioning[MASK]
        check_shape(MASK, mask, (wanted.batch, 1, wanted.height, wanted.width))
        masked = (pixels * (1 - whole_mask(mask)[: pixels.shape[0]])).contiguous(memory_format=torch.channels_last)
        return Sampled(skipped=pixels.shape[0], after={latents: masked})  # in the pipeline's order in memory, of Pillow

    def start(
        self, model: Model[Flux1Config], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> Flux1Run:
        config = model.config
        embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
        check_shape("prompt_embeds", embeds, (wanted.batch, None, config.context_channels))
        check_shape("pooled_prompt_embeds", pooled, (wanted.batch, config.pooled_channels))
        rows, columns = (side // PIXELS_PER_LATENT // PATCH for side in (wanted.height, wanted.width))
        given = _reference_of(conditioning.get(REFERENCES))
        after = 0 if given is None else given.shape[1] * given.shape[2] // PATCH**2
        partition_tokens(embeds.shape[1], rows * columns + after, model.layout.degrees.sequence)
        embeds, pooled = prepare(model, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
        beside = _channels_beside(model, wanted, conditioning)
        reference, places = (None, []) if given is None else _packed_reference(model, wanted, given, noise.dtype)
        latents = cast(torch.Tensor, FluxPipeline._pack_latents(noise.contiguous(), *noise.shape))
        scheduler = tried(wanted.schedule, lambda: _scheduled(config, wanted, latents.shape[1], model.device))
        # As the pipeline gives them to the model. The host reads them here, before it would wait for GPU work.
        timesteps = scheduler.timesteps.to(latents.dtype) / SCALE
        guidance = torch.full([1], wanted.guidance_scale, device=model.device, dtype=torch.float32)
        fixed = {
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "txt_ids": torch.zeros(embeds.shape[1], 3).to(model.device, embeds.dtype),
            "img_ids": torch.cat([_ids(rows, columns, model.device, latents.dtype), *places]),
            "guidance": guidance.expand(wanted.batch) if config.has_guidance else None,
        }
        return Flux1Run(
            scheduler=scheduler,
            latents=latents,
            beside=beside,
            reference=reference,
            timesteps=timesteps,
            foreseen={"timestep": tuple(timesteps.tolist())},
            fixed=fixed,
            known={"guidance": tuple(guidance.tolist()) * wanted.batch} if config.has_guidance else {},
            dtype=model.dtype,
            size=(rows * PATCH, columns * PATCH),
        )


@dataclass(frozen=True, eq=False)
class Flux1Run:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`. Latents are packed, (batch, tokens, 64)."""

    scheduler: FlowMatchEulerDiscreteScheduler
    latents: torch.Tensor
    beside: torch.Tensor | None
    """The channels of each token beside those of the latents, (batch, tokens, channels)."""
    reference: torch.Tensor | None
    """The tokens after those of the image, (batch, tokens, 64)."""
    timesteps: torch.Tensor
    """The model's timestep at each step, (steps,)."""
    foreseen: Mapping[str, tuple[float, ...]]
    fixed: Mapping[str, Any]
    """Arguments that do not change between steps."""
    known: Mapping[str, tuple[float, ...]]
    dtype: torch.dtype
    """Of the weights."""
    size: tuple[int, int]
    """Height and width of the latents, unpacked."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        batch, tokens = latents.shape[0], latents.to(self.dtype)
        if self.beside is not None:
            tokens = torch.cat([tokens, self.beside], dim=2)
        if self.reference is not None:
            tokens = torch.cat([tokens, self.reference], dim=1)
        arguments = {
            "hidden_states": tokens,
            "timestep": self.timesteps[step].expand(batch),
            **self.fixed,
        }
        return [Inputs(arguments, {"timestep": (self.foreseen["timestep"][step],) * batch, **self.known})]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        (result,) = rows
        # Float32 latents are stepped in float32.
        predicted = result if isinstance(result, torch.Tensor) else torch.stack(result)
        return predicted[:, : latents.shape[1]].to(latents.dtype)

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, FluxPipeline._pack_latents(latents.contiguous(), *latents.shape))

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        height, width = self.size
        return cast(torch.Tensor, FluxPipeline._unpack_latents(latents, height, width, 1))


def _ids(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return cast(torch.Tensor, FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, dtype))


def _reference_of(given: Any) -> torch.Tensor | None:
    """Return the latents of Kontext's reference, (16, height, width), as they were given.

    Raises:
        BadRequest: no list of one tensor, or a wrong shape.
    """
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or len(given) != 1:
        what = f"{len(given)} tensors" if isinstance(given, (list, tuple)) else type(given).__name__
        raise BadRequest(
            f"{REFERENCES}: {what} where a list of one tensor is needed: FLUX.1 Kontext's pipeline has one reference; "
            "join several pictures into one"
        )
    (reference,) = given
    name = f"{REFERENCES}[0]"
    check_shape(name, reference, (LATENT_CHANNELS, None, None))
    sides = reference.shape[1:]
    if any(side % PATCH or not 0 < side * PIXELS_PER_LATENT <= MAX_SIDE_PIXELS for side in sides):
        most = MAX_SIDE_PIXELS // PIXELS_PER_LATENT
        raise BadRequest(f"{name}: shape is {list(reference.shape)}, use even sides of at most {most}")
    return cast(torch.Tensor, reference)


def _packed_reference(
    model: Model[Flux1Config], wanted: Wanted, given: torch.Tensor, ids_dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the tokens of a reference, (batch, tokens, 64), and their ids, which are on the plane 1."""
    (reference,) = prepare(model, **{f"{REFERENCES}[0]": given})
    channels, height, width = reference.shape
    packed = FluxPipeline._pack_latents(reference[None].contiguous(), 1, channels, height, width)
    ids = _ids(height // PATCH, width // PATCH, model.device, ids_dtype)
    ids[..., 0] = 1
    return packed.repeat(wanted.batch, 1, 1), [ids]


def _channels_beside(model: Model[Flux1Config], wanted: Wanted, conditioning: Mapping[str, Any]) -> torch.Tensor | None:
    """Check and pack what the image is made from besides the text, (batch, tokens, channels)."""
    size = (wanted.height // PIXELS_PER_LATENT, wanted.width // PIXELS_PER_LATENT)
    if (needed := _PICTURES.get(model.config.in_channels)) and conditioning.get(needed[0]) is None:
        raise BadRequest(f"{needed[1]}, {needed[0]}: give either the picture or its latents")
    named = {name: conditioning[name] for name in (CONTROL, MASKED_IMAGE, MASK) if name in conditioning}
    if conditioning.get(IMAGE) is not None:
        named[MASK] = whole_mask(named[MASK])
    for name, each in named.items():
        shape = (1, wanted.height, wanted.width) if name == MASK else (LATENT_CHANNELS, *size)
        check_shape(name, each, (wanted.batch, *shape))
    if not named:
        return None
    prepared = dict(zip(named, prepare(model, **named), strict=True))
    if MASK in prepared:
        # Each latent has the pixels of its square as channels.
        squares = prepared[MASK][:, 0].unflatten(1, (-1, PIXELS_PER_LATENT)).unflatten(3, (-1, PIXELS_PER_LATENT))
        prepared[MASK] = squares.permute(0, 2, 4, 1, 3).flatten(1, 2)
    packed = [FluxPipeline._pack_latents(each.contiguous(), *each.shape) for each in prepared.values()]
    return torch.cat(packed, dim=2)


def _scheduled(
    config: Flux1Config, wanted: Wanted, image_tokens: int, device: torch.device
) -> FlowMatchEulerDiscreteScheduler:
    """Set the timesteps: the model's own schedule, or given sigmas, which a scheduler shifts if it is given, too."""
    given = wanted.sigmas
    settings = dict(config.scheduler) if given is None else {"shift": 1.0, "use_dynamic_shifting": False}
    scheduler = euler(wanted.schedule, settings)
    known = scheduler.config
    shift = calculate_shift(
        image_tokens,
        known.get("base_image_seq_len", 256),
        known.get("max_image_seq_len", 4096),
        known.get("base_shift", 0.5),
        known.get("max_shift", 1.15),
    )
    sigmas = np.linspace(1.0, 1 / wanted.steps, wanted.steps) if given is None else list(given)
    retrieve_timesteps(scheduler, wanted.steps, device, sigmas=sigmas, mu=shift)
    scheduler.set_begin_index(0)
    return scheduler
