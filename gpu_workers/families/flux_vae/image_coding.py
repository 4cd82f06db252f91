"""What jobs do with a plugged VAE: ``decode`` and ``encode``. No I/O.

Latents are those of FLUX.1's transformer, (batch, 16, height / 8, width / 8). Inputs may be on any device; results are
on the skeleton's.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers import AutoencoderKL

from xditd.gpu_workers.families.flux_vae.checkpoint import (
    IMAGE_CHANNELS,
    LATENT_CHANNELS,
    PIXELS_PER_LATENT,
    SCALING,
    SHIFT,
    FluxVaeConfig,
)
from xditd.gpu_workers.families.flux_vae.split_decode import Bands, SplitDecoder
from xditd.gpu_workers.models.job_checks import check_sides, prepare
from xditd.gpu_workers.models.skeletons import Skeleton
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.limits import MAX_BATCH, MAX_SIDE_PIXELS


@torch.inference_mode()
def decode(
    skeleton: Skeleton, latents: torch.Tensor, *, clamp: bool = True, bands: Bands | None = None
) -> torch.Tensor:
    """Decode latents as ``generate`` returns them into an image (batch, 3, height, width).

    It lies in [-1, 1], without ``clamp`` only about there, for callers who join tiles first. Each rank decodes the
    whole image alone, unless there are ``bands``: then all ranks call this, and each computes its rows of each sample.

    Raises:
        BadRequest: not latents of this VAE, or values that are not finite.
    """
    vae, _ = _vae(skeleton)
    if latents.ndim != 4 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
        raise BadRequest(f"latents are {list(latents.shape)}: use [batch, {LATENT_CHANNELS}, height / 8, width / 8]")
    if max(latents.shape[2:]) * PIXELS_PER_LATENT > MAX_SIDE_PIXELS or latents.shape[0] > MAX_BATCH:
        raise BadRequest(
            f"latents are {list(latents.shape)}: use a batch up to {MAX_BATCH}, {MAX_SIDE_PIXELS} pixels on a side"
        )
    (latents,) = prepare(skeleton, latents=latents)
    latents = latents / SCALING + SHIFT
    if bands is None:
        image = cast(torch.Tensor, vae.decode(latents, return_dict=False)[0])
    else:
        split = SplitDecoder(vae.decoder, bands, latents.shape[2])
        image = torch.cat([split(sample) for sample in latents.split(1)])
    return image.clamp(-1.0, 1.0) if clamp else image


@torch.inference_mode()
def encode(skeleton: Skeleton, image: torch.Tensor) -> torch.Tensor:
    """Encode an image (batch, 3, height, width) in [-1, 1] into latents as ``generate`` takes and returns them.

    The latents are the mode of the posterior, so that the same image always gives the same latents.

    Raises:
        BadRequest: sizes that are not multiples of 8, or values that are not finite.
        Unsupported: the VAE was lent without its encoder.
    """
    vae, config = _vae(skeleton)
    if not config.has_encoder:
        raise Unsupported("encode: this VAE was lent without its encoder tensors; lend the whole VAE")
    if image.ndim != 4 or image.shape[1] != IMAGE_CHANNELS or not 0 < image.shape[0] <= MAX_BATCH:
        raise BadRequest(f"image is {list(image.shape)}: use [batch, {IMAGE_CHANNELS}, height, width]")
    check_sides(image.shape[2], image.shape[3], PIXELS_PER_LATENT)
    (image,) = prepare(skeleton, image=image)
    return cast(torch.Tensor, (vae.encode(image).latent_dist.mode() - SHIFT) * SCALING)


def _vae(skeleton: Skeleton) -> tuple[AutoencoderKL, FluxVaeConfig]:
    if not isinstance(skeleton.config, FluxVaeConfig):
        raise BadRequest(f"the job needs a VAE, but the component is a {skeleton.family.kind}")
    return cast(AutoencoderKL, skeleton.module), skeleton.config
