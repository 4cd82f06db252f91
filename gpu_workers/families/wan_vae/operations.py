"""Build the VAE of Wan 2.1 and Qwen-Image, decode and encode images and videos.

Latents are (batch, 16, height / 8, width / 8), with the mean and deviation of each channel taken off. Those of videos
are (batch, 16, (frames - 1) / 4 + 1, height / 8, width / 8): a latent frame after another is decoded, and what the next
one needs of those before it is kept, so that memory besides the video does not grow with the length.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from xditd.gpu_workers.families.wan_vae.config import (
    DEVIATIONS,
    FRAMES_PER_LATENT,
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
from xditd.gpu_workers.models.job_checks import check_has_encoder, check_latent_size, check_sides, prepare
from xditd.gpu_workers.models.operations import Model
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentFacts, LatentScaling, VaeFacts
from xditd.ipc.limits import MAX_BATCH


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
            latents=LatentFacts(
                channels=LATENT_CHANNELS, pixels=PIXELS_PER_LATENT, frames=FRAMES_PER_LATENT, scaling=SCALING
            ),
            image_channels=IMAGE_CHANNELS,
            has_encoder=config.has_encoder,
        )

    def shares(self, model: Model[WanVaeConfig], latents: torch.Tensor) -> bool:
        return False

    @torch.inference_mode()
    def decode(
        self, model: Model[WanVaeConfig], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> torch.Tensor:
        if latents.ndim not in (4, 5) or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
            raise BadRequest(
                f"latents are {list(latents.shape)}: use [batch, {LATENT_CHANNELS}, height / 8, width / 8], or of "
                f"videos [batch, {LATENT_CHANNELS}, (frames - 1) / 4 + 1, height / 8, width / 8]"
            )
        check_latent_size(latents, PIXELS_PER_LATENT)
        vae = cast(AutoencoderKLQwenImage, model.module)
        (latents,) = prepare(model, latents=latents)
        means, deviations = _statistics(latents)
        # As the pipelines do it, for the same bits: the deviation is inverted twice.
        z = (latents / scaling.factor + scaling.shift) / (1.0 / deviations) + means
        # Not vae.decode, which clamps. The first frame of a video has no frames before it in any cache.
        convolutions = sum(isinstance(each, QwenImageCausalConv3d) for each in vae.decoder.modules())
        cache: list[Any] = [None] * convolutions
        if z.ndim == 4:
            x = vae.post_quant_conv(z.unsqueeze(2))
            return cast(torch.Tensor, vae.decoder(x, feat_cache=cache, feat_idx=[0])[:, :, 0])
        x = vae.post_quant_conv(z)
        shape = self.facts(model.config).latents.pixels_of(tuple(z.shape), IMAGE_CHANNELS)
        video = torch.empty(shape, device=z.device, dtype=z.dtype)
        done = 0
        for number in range(z.shape[2]):
            chunk = vae.decoder(x[:, :, number : number + 1], feat_cache=cache, feat_idx=[0])
            video[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        return video

    @torch.inference_mode()
    def encode(self, model: Model[WanVaeConfig], image: torch.Tensor, scaling: LatentScaling) -> torch.Tensor:
        check_has_encoder(model.config.has_encoder)
        if image.ndim not in (4, 5) or image.shape[1] != IMAGE_CHANNELS or not 0 < image.shape[0] <= MAX_BATCH:
            raise BadRequest(
                f"image is {list(image.shape)}: use [batch, {IMAGE_CHANNELS}, height, width], or of videos "
                f"[batch, {IMAGE_CHANNELS}, frames, height, width]"
            )
        check_sides(image.shape[-2], image.shape[-1], PIXELS_PER_LATENT)
        if image.ndim == 5:
            self.facts(model.config).latents.check_frames(image.shape[2])
        vae = cast(AutoencoderKLQwenImage, model.module)
        (image,) = prepare(model, image=image)
        if image.ndim == 4:
            z = vae.encode(image.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        else:
            z = vae.encode(image).latent_dist.mode()
        means, deviations = _statistics(z)
        return cast(torch.Tensor, ((z - means) / deviations - scaling.shift) * scaling.factor)


def _statistics(like: torch.Tensor) -> list[torch.Tensor]:
    """Return means and deviations of the channels, (1, channels, 1, 1) each, or with one more dimension."""
    shape = (1, -1, *(1 for _ in like.shape[2:]))
    return [torch.tensor(each).view(shape).to(like.device, like.dtype) for each in (MEANS, DEVIATIONS)]
