"""Build FLUX.1's VAE, decode and encode.

Latents are (batch, 16, height / 8, width / 8), scaled as transformers take them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import AutoencoderKL

from xditd.gpu_workers.families.flux_vae.config import (
    LATENT_CHANNELS,
    LEVELS,
    PIXELS_PER_LATENT,
    SCALING,
    SPACE,
    FluxVaeConfig,
)
from xditd.gpu_workers.models.job_checks import check_has_encoder, check_latent_size, prepare, prepare_image
from xditd.gpu_workers.models.ldm_vae import IMAGE_CHANNELS, NORM_GROUPS
from xditd.gpu_workers.models.operations import Model
from xditd.gpu_workers.models.split_decode import Bands, SplitDecoder, whole_group
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentFacts, LatentScaling, VaeFacts


class FluxVaeOperations:
    """See :class:`~xditd.gpu_workers.models.operations.VaeOperations`."""

    def build(self, config: FluxVaeConfig) -> torch.nn.Module:
        module = AutoencoderKL(
            in_channels=IMAGE_CHANNELS,
            out_channels=IMAGE_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * LEVELS,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            block_out_channels=config.channels,
            layers_per_block=config.residuals,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=NORM_GROUPS,
            sample_size=1024,
            scaling_factor=SCALING.factor,
            shift_factor=SCALING.shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=config.has_mid_attention,
        )
        if not config.has_encoder:
            module.encoder = None
        return cast(torch.nn.Module, module)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: FluxVaeConfig) -> VaeFacts:
        return VaeFacts(
            latents=LatentFacts(channels=LATENT_CHANNELS, pixels=PIXELS_PER_LATENT, scaling=SCALING, space=SPACE),
            image_channels=IMAGE_CHANNELS,
            has_encoder=config.has_encoder,
        )

    @cached_property
    def _bands(self) -> Bands:
        return whole_group()

    def shares(self, model: Model[FluxVaeConfig], latents: torch.Tensor) -> bool:
        return latents.ndim == 4 and self._bands.fit(*latents.shape[2:])

    def shares_encode(self, model: Model[FluxVaeConfig], image: torch.Tensor) -> bool:
        return False

    @torch.inference_mode()
    def decode(
        self, model: Model[FluxVaeConfig], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> Generator[torch.Tensor]:
        vae = cast(AutoencoderKL, model.module)
        if latents.ndim != 4 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
            raise BadRequest(
                f"latents are {list(latents.shape)}: use [batch, {LATENT_CHANNELS}, height / 8, width / 8]"
            )
        check_latent_size(latents, PIXELS_PER_LATENT)
        (latents,) = prepare(model, latents=latents)
        latents = latents / scaling.factor + scaling.shift
        if not is_shared:
            yield vae.decode(latents, return_dict=False)[0]
            return
        split = SplitDecoder(vae.decoder, self._bands, latents.shape[2])
        yield torch.cat([split(sample) for sample in latents.split(1)])

    @torch.inference_mode()
    def encode(
        self, model: Model[FluxVaeConfig], image: torch.Tensor, scaling: LatentScaling, *, is_shared: bool = False
    ) -> torch.Tensor:
        return cast(torch.Tensor, (self._distribution(model, image).mode() - scaling.shift) * scaling.factor)

    @torch.inference_mode()
    def sample(
        self,
        model: Model[FluxVaeConfig],
        image: torch.Tensor,
        scaling: LatentScaling,
        draw: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> torch.Tensor:
        """Encode images as :meth:`encode` does, to a sample of the posterior with the noise that ``draw`` gives."""
        found = self._distribution(model, image)
        noise = draw(tuple(found.mean.shape), found.mean.dtype).to(found.mean.device)
        return cast(torch.Tensor, (found.mean + found.std * noise - scaling.shift) * scaling.factor)

    def _distribution(self, model: Model[FluxVaeConfig], image: torch.Tensor) -> Any:
        vae = cast(AutoencoderKL, model.module)
        check_has_encoder(model.config.has_encoder)
        image = prepare_image(model, image, IMAGE_CHANNELS, PIXELS_PER_LATENT)
        return vae.encode(image).latent_dist
