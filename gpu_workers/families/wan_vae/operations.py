"""Build the VAE of Wan 2.1 and Qwen-Image, decode and encode single images.

Latents are (batch, 16, height / 8, width / 8), with the mean and deviation of each channel taken off.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from xditd.gpu_workers.families.wan_vae.config import (
    DEVIATIONS,
    IMAGE_CHANNELS,
    IN_TIME,
    LATENT_CHANNELS,
    MEANS,
    PIXELS_PER_LATENT,
    RESIDUALS,
    SCALING,
    WIDTHS,
    WanVaeConfig,
)
from xditd.gpu_workers.models.job_checks import check_sides, prepare
from xditd.gpu_workers.models.operations import Model
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import LatentFacts, LatentScaling, VaeFacts
from xditd.ipc.limits import MAX_BATCH, MAX_SIDE_PIXELS


class WanVaeOperations:
    """See :class:`~xditd.gpu_workers.models.operations.VaeOperations`."""

    def build(self, config: WanVaeConfig) -> torch.nn.Module:
        module = AutoencoderKLQwenImage(
            base_dim=config.width,
            z_dim=LATENT_CHANNELS,
            dim_mult=list(WIDTHS),
            num_res_blocks=RESIDUALS,
            temperal_downsample=list(IN_TIME),
            input_channels=IMAGE_CHANNELS,
        )
        if not config.has_encoder:
            module.encoder = module.quant_conv = None
        return cast(torch.nn.Module, module)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: WanVaeConfig) -> VaeFacts:
        return VaeFacts(
            latents=LatentFacts(channels=LATENT_CHANNELS, pixels=PIXELS_PER_LATENT, scaling=SCALING),
            image_channels=IMAGE_CHANNELS,
            has_encoder=config.has_encoder,
        )

    def shares(self, model: Model[WanVaeConfig], latents: torch.Tensor) -> bool:
        return False

    @torch.inference_mode()
    def decode(
        self, model: Model[WanVaeConfig], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> torch.Tensor:
        if latents.ndim != 4 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
            raise BadRequest(
                f"latents are {list(latents.shape)}: use [batch, {LATENT_CHANNELS}, height / 8, width / 8]"
            )
        if max(latents.shape[2:]) * PIXELS_PER_LATENT > MAX_SIDE_PIXELS or latents.shape[0] > MAX_BATCH:
            raise BadRequest(
                f"latents are {list(latents.shape)}: use a batch up to {MAX_BATCH}, {MAX_SIDE_PIXELS} pixels on a side"
            )
        vae = cast(AutoencoderKLQwenImage, model.module)
        (latents,) = prepare(model, latents=latents)
        means, deviations = _statistics(latents)
        # As the pipelines do it, for the same bits: the deviation is inverted twice.
        z = (latents / scaling.factor + scaling.shift) / (1.0 / deviations) + means
        # Not vae.decode, which clamps. The first frame of a video has no frames before it in any cache.
        convolutions = sum(isinstance(each, QwenImageCausalConv3d) for each in vae.decoder.modules())
        x = vae.post_quant_conv(z.unsqueeze(2))
        return cast(torch.Tensor, vae.decoder(x, feat_cache=[None] * convolutions, feat_idx=[0])[:, :, 0])

    @torch.inference_mode()
    def encode(self, model: Model[WanVaeConfig], image: torch.Tensor, scaling: LatentScaling) -> torch.Tensor:
        if not model.config.has_encoder:
            raise Unsupported("encode: this VAE was lent without its encoder tensors; lend the whole VAE")
        if image.ndim != 4 or image.shape[1] != IMAGE_CHANNELS or not 0 < image.shape[0] <= MAX_BATCH:
            raise BadRequest(f"image is {list(image.shape)}: use [batch, {IMAGE_CHANNELS}, height, width]")
        check_sides(image.shape[2], image.shape[3], PIXELS_PER_LATENT)
        vae = cast(AutoencoderKLQwenImage, model.module)
        (image,) = prepare(model, image=image)
        z = vae.encode(image.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        means, deviations = _statistics(z)
        return cast(torch.Tensor, ((z - means) / deviations - scaling.shift) * scaling.factor)


def _statistics(like: torch.Tensor) -> list[torch.Tensor]:
    """Return means and deviations of the channels, (1, channels, 1, 1) each."""
    return [torch.tensor(each).view(1, -1, 1, 1).to(like.device, like.dtype) for each in (MEANS, DEVIATIONS)]
