"""Build FLUX.2's VAE, decode and encode, as diffusers' ``Flux2Pipeline`` does.

Latents are (batch, 128, height / 16, width / 16): patches of 2x2 of the VAE's 32 channels, normalised by the statistics
in its file.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import cached_property
from typing import cast

import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline

from xditd.gpu_workers.families.flux2_vae.config import (
    EPSILON,
    LATENT_CHANNELS,
    LEVELS,
    PATCH,
    PIXELS_PER_LATENT,
    SCALING,
    SPACE,
    Z_CHANNELS,
    Flux2VaeConfig,
)
from xditd.gpu_workers.models.job_checks import check_has_encoder, check_latent_size, prepare, prepare_image
from xditd.gpu_workers.models.ldm_vae import IMAGE_CHANNELS, NORM_GROUPS
from xditd.gpu_workers.models.operations import Model
from xditd.gpu_workers.models.split_decode import Bands, SplitDecoder, whole_group
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentFacts, LatentScaling, VaeFacts


class Statistics(torch.nn.Module):
    """The running mean and variance of the class's batch norm, which are buffers there, as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean = torch.nn.Parameter(torch.empty(LATENT_CHANNELS), requires_grad=False)
        self.running_var = torch.nn.Parameter(torch.empty(LATENT_CHANNELS), requires_grad=False)

    def of(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation, (1, 128, 1, 1) each, in the dtype of ``latents``."""
        mean, variance = (each.view(1, -1, 1, 1) for each in (self.running_mean, self.running_var))
        return mean.to(latents.dtype), torch.sqrt(variance + EPSILON).to(latents.dtype)


class Flux2VaeOperations:
    """See :class:`~xditd.gpu_workers.models.operations.VaeOperations`."""

    def build(self, config: Flux2VaeConfig) -> torch.nn.Module:
        module = AutoencoderKLFlux2(
            in_channels=IMAGE_CHANNELS,
            out_channels=IMAGE_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * LEVELS,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            block_out_channels=config.encoder_channels or config.channels,
            decoder_block_out_channels=config.channels,
            layers_per_block=config.residuals,
            latent_channels=Z_CHANNELS,
            norm_num_groups=NORM_GROUPS,
            use_quant_conv=config.has_quant_conv,
            use_post_quant_conv=config.has_quant_conv,
        )
        if not config.has_encoder:
            module.encoder = module.quant_conv = None
        module.bn = Statistics()
        return cast(torch.nn.Module, module)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: Flux2VaeConfig) -> VaeFacts:
        return VaeFacts(
            latents=LatentFacts(channels=LATENT_CHANNELS, pixels=PIXELS_PER_LATENT, scaling=SCALING, space=SPACE),
            image_channels=IMAGE_CHANNELS,
            has_encoder=config.has_encoder,
        )

    @cached_property
    def _bands(self) -> Bands:
        return whole_group()

    def shares(self, model: Model[Flux2VaeConfig], latents: torch.Tensor) -> bool:
        return latents.ndim == 4 and self._bands.fit(*(PATCH * side for side in latents.shape[2:]))

    def shares_encode(self, model: Model[Flux2VaeConfig], image: torch.Tensor) -> bool:
        return False

    @torch.inference_mode()
    def decode(
        self, model: Model[Flux2VaeConfig], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> Generator[torch.Tensor]:
        vae = cast(AutoencoderKLFlux2, model.module)
        if latents.ndim != 4 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
            raise BadRequest(
                f"latents are {list(latents.shape)}: use [batch, {LATENT_CHANNELS}, height / 16, width / 16]"
            )
        check_latent_size(latents, PIXELS_PER_LATENT)
        (latents,) = prepare(model, latents=latents)
        latents = latents / scaling.factor + scaling.shift
        mean, deviation = vae.bn.of(latents)
        z = Flux2Pipeline._unpatchify_latents(latents * deviation + mean)
        if not is_shared:
            yield vae.decode(z, return_dict=False)[0]
            return
        if vae.post_quant_conv is not None:
            z = vae.post_quant_conv(z)
        split = SplitDecoder(vae.decoder, self._bands, z.shape[2])
        yield torch.cat([split(sample) for sample in z.split(1)])

    @torch.inference_mode()
    def encode(
        self, model: Model[Flux2VaeConfig], image: torch.Tensor, scaling: LatentScaling, *, is_shared: bool = False
    ) -> torch.Tensor:
        vae = cast(AutoencoderKLFlux2, model.module)
        check_has_encoder(model.config.has_encoder)
        image = prepare_image(model, image, IMAGE_CHANNELS, PIXELS_PER_LATENT)
        latents = Flux2Pipeline._patchify_latents(vae.encode(image).latent_dist.mode())
        mean, deviation = vae.bn.of(latents)
        return cast(torch.Tensor, ((latents - mean) / deviation - scaling.shift) * scaling.factor)
