"""Jobs before they are sent: checked inputs, where each tensor will lie, and how the request will read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from xditd.client import job_inputs
from xditd.client.conditioning import Conditioning
from xditd.client.io_blocks import IoBlock, IoLayout, IoPool
from xditd.client.text_encoding import check_token_ids
from xditd.ipc.requests import Decode, Denoise, Encode, EncodeText, Generate, Job, Part
from xditd.ipc.tensors import HostShmBlock, IoTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Draft:
    """``write`` makes the request, once there are a request id and a block.

    ``second`` is another output: the image of a generation, the pooled state of a text; ``denoised`` is where a
    generation's steps leave what they take the clean latents for.
    """

    layout: IoLayout
    inputs: tuple[tuple[IoTensor, torch.Tensor], ...]
    output: IoTensor
    second: IoTensor | None
    device: torch.device
    write: Callable[[str, HostShmBlock], Job]
    denoised: IoTensor | None = None

    def fill(self, pool: IoPool) -> IoBlock:
        """Borrow a block and copy the inputs in."""
        block = pool.borrow(self.layout.size_bytes)
        try:
            for spec, tensor in self.inputs:
                block.write(spec, tensor)
        except BaseException:
            pool.give_back(block)
            raise
        return block


def draft_generate(
    transformer_id: str,
    vae_id: str | None,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    height: int,
    width: int,
    steps: int,
    sigmas: Sequence[float] | torch.Tensor | None,
    guidance_scale: float,
    seed: int | None,
    noise: torch.Tensor | None,
    previews: bool,
    step_cache: float,
    variant: str,
) -> Draft:
    """Check and lay out a generation. Exactly one of ``seed`` and ``noise`` is given."""
    import torch

    batch = job_inputs.check_embeds(prompt_embeds, pooled_prompt_embeds)
    job_inputs.check_size(height, width)
    job_inputs.check_steps(steps)
    guidance_scale = job_inputs.check_guidance("guidance_scale", guidance_scale)
    threshold = job_inputs.check_step_cache(step_cache)
    schedule = None if sigmas is None else job_inputs.check_sigmas(sigmas, steps)
    checked_variant = job_inputs.check_variant(variant)
    if noise is not None:
        job_inputs.check_noise(noise, batch, height, width)
    else:
        job_inputs.check_whole("seed", 0 if seed is None else seed, 0, 2**63 - 1)

    layout = IoLayout()
    embeds_at, pooled_at = layout.add_input(prompt_embeds), layout.add_input(pooled_prompt_embeds)
    inputs = [(embeds_at, prompt_embeds), (pooled_at, pooled_prompt_embeds)]
    noise_at = None
    if noise is not None:
        noise_at = layout.add_input(noise)
        inputs.append((noise_at, noise))
    like = prompt_embeds if noise is None else noise
    side = job_inputs.PIXELS_PER_LATENT
    latents_at = layout.add_output(like.dtype, (batch, job_inputs.LATENT_CHANNELS, height // side, width // side))
    image_at = None if vae_id is None else layout.add_output(torch.float32, (batch, 3, height, width))
    denoised_at = layout.add_output(like.dtype, latents_at.shape) if previews else None

    def write(request_id: str, io: HostShmBlock) -> Generate:
        return Generate(
            request_id=request_id,
            transformer_id=transformer_id,
            vae_id=vae_id,
            io=io,
            prompt_embeds=embeds_at,
            pooled_prompt_embeds=pooled_at,
            noise=noise_at,
            seed=seed,
            height=height,
            width=width,
            steps=steps,
            sigmas=schedule,
            guidance_scale=guidance_scale,
            out_latents=latents_at,
            out_image=image_at,
            out_denoised=denoised_at,
            step_cache_threshold=threshold,
            variant=checked_variant,
        )

    return Draft(layout, tuple(inputs), latents_at, image_at, like.device, write, denoised_at)


def draft_denoise(
    transformer_id: str,
    latents: torch.Tensor,
    timestep: float | Sequence[float] | torch.Tensor,
    conditionings: Sequence[Conditioning],
    guidance: float | None,
    to_come: Sequence[float] | torch.Tensor | None,
    variant: str,
    is_kept: Callable[[Conditioning], bool],
) -> Draft:
    """Check and lay out one forward of the transformer; what ``is_kept`` says is kept goes by its name alone."""
    job_inputs.check_latents("latents", latents)
    job_inputs.check_even_latents("latents", latents)
    batch = latents.shape[0]
    shares = job_inputs.check_shares(batch, [conditioning.batch for conditioning in conditionings])
    sigmas = job_inputs.check_timestep(timestep, batch)
    scale = None if guidance is None else job_inputs.check_guidance("guidance", guidance)
    foreseen = job_inputs.check_foreseen(to_come)
    checked_variant = job_inputs.check_variant(variant)

    layout = IoLayout()
    latents_at = layout.add_input(latents)
    inputs = [(latents_at, latents)]
    parts = []
    for conditioning, rows in zip(conditionings, shares, strict=True):
        part = Part(
            rows=rows,
            conditioning_id=conditioning.conditioning_id,
            guidance=conditioning.guidance if scale is None else scale,
        )
        if conditioning.conditioning_id is None or not is_kept(conditioning):
            embeds_at = layout.add_input(conditioning.prompt_embeds)
            pooled_at = layout.add_input(conditioning.pooled_prompt_embeds)
            inputs += [(embeds_at, conditioning.prompt_embeds), (pooled_at, conditioning.pooled_prompt_embeds)]
            part = msgspec.structs.replace(part, prompt_embeds=embeds_at, pooled_prompt_embeds=pooled_at)
        parts.append(part)
    out_at = layout.add_output(latents.dtype, tuple(latents.shape))

    def write(request_id: str, io: HostShmBlock) -> Denoise:
        return Denoise(
            request_id=request_id,
            transformer_id=transformer_id,
            io=io,
            latents=latents_at,
            timestep=sigmas,
            parts=tuple(parts),
            sigmas=foreseen,
            variant=checked_variant,
            out=out_at,
        )

    return Draft(layout, tuple(inputs), out_at, None, latents.device, write)


def draft_decode(vae_id: str, latents: torch.Tensor) -> Draft:
    """Check and lay out a decoding."""
    job_inputs.check_latents("latents", latents)
    batch, _, height, width = latents.shape
    side = job_inputs.PIXELS_PER_LATENT
    layout = IoLayout()
    latents_at = layout.add_input(latents)
    out_at = layout.add_output(latents.dtype, (batch, 3, height * side, width * side))

    def write(request_id: str, io: HostShmBlock) -> Decode:
        return Decode(request_id=request_id, vae_id=vae_id, io=io, latents=latents_at, out=out_at)

    return Draft(layout, ((latents_at, latents),), out_at, None, latents.device, write)


def draft_encode(vae_id: str, image: torch.Tensor) -> Draft:
    """Check and lay out an encoding. The image crosses in the layout that it has, channels first or last."""
    job_inputs.check_image(image)
    batch, _, height, width = image.shape
    side = job_inputs.PIXELS_PER_LATENT
    layout = IoLayout()
    if _has_channels_last(image):
        image = image.movedim(1, -1)
    image_at = layout.add_input(image)
    out_at = layout.add_output(image.dtype, (batch, job_inputs.LATENT_CHANNELS, height // side, width // side))

    def write(request_id: str, io: HostShmBlock) -> Encode:
        return Encode(request_id=request_id, vae_id=vae_id, io=io, image=image_at, out=out_at)

    return Draft(layout, ((image_at, image),), out_at, None, image.device, write)


def _has_channels_last(image: torch.Tensor) -> bool:
    """Whether convolutions would take it as channels-last: its strides say so, whole or cut out of a larger image.

    They compute in that layout, and round differently then. So the workers must see the one that the client has.
    """
    _, channels, _, width = image.shape
    return image.stride(1) == 1 and image.stride(3) >= channels > 1 and image.stride(2) >= image.stride(3) * width


def draft_encode_text(
    encoder_id: str, token_ids: torch.Tensor | Sequence[Sequence[int]], width: int, *, pooled: bool
) -> Draft:
    """Check and lay out an encoding of text; ``second`` is the place of the pooled state."""
    import torch

    ids = check_token_ids(token_ids)
    layout = IoLayout()
    ids_at = layout.add_input(ids)
    out_at = layout.add_output(torch.float32, (*ids.shape, width))
    pooled_at = layout.add_output(torch.float32, (ids.shape[0], width)) if pooled else None

    def write(request_id: str, io: HostShmBlock) -> EncodeText:
        return EncodeText(
            request_id=request_id, encoder_id=encoder_id, io=io, token_ids=ids_at, out=out_at, out_pooled=pooled_at
        )

    return Draft(layout, ((ids_at, ids),), out_at, pooled_at, ids.device, write)
