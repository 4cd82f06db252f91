"""Build the VAEs of Wan and Qwen-Image, decode and encode images and videos.

Latents are (batch, 16, height / 8, width / 8), of Wan 2.2 TI2V (batch, 48, height / 16, width / 16), with the mean and
deviation of each channel taken off. Those of videos are (batch, channels, (frames - 1) / 4 + 1, ...): a latent frame
after another is decoded, and what the next one needs of those before it is kept, so that memory besides the video does
not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

from xditd.gpu_workers.families.wan_vae.config import (
    FRAMES_PER_LATENT,
    IMAGE_CHANNELS,
    IN_TIME,
    RESIDUALS,
    SCALING,
    WIDTHS,
    Release,
    WanVaeConfig,
)
from xditd.gpu_workers.families.wan_vae.split_rows import rows_split
from xditd.gpu_workers.models.job_checks import check_has_encoder, check_latent_size, check_sides, prepare
from xditd.gpu_workers.models.operations import Model
from xditd.gpu_workers.models.split_decode import Bands, whole_group
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentFacts, LatentScaling, VaeFacts
from xditd.ipc.limits import MAX_BATCH


class WanVaeOperations:
    """See :class:`~xditd.gpu_workers.models.operations.VaeOperations`."""

    def build(self, config: WanVaeConfig) -> torch.nn.Module:
        release = config.release
        module = AutoencoderKLWan(
            base_dim=config.encoder_width or config.width,
            decoder_base_dim=config.width,
            z_dim=release.channels,
            dim_mult=list(WIDTHS),
            num_res_blocks=RESIDUALS,
            temperal_downsample=list(IN_TIME),
            latents_mean=list(release.means),
            latents_std=list(release.deviations),
            is_residual=release.has_averages,
            in_channels=release.planes,
            out_channels=release.planes,
            patch_size=release.patch if release.patch > 1 else None,
            scale_factor_temporal=FRAMES_PER_LATENT,
            scale_factor_spatial=release.pixels,
        )
        if not config.has_encoder:
            module.encoder = module.quant_conv = None
        return cast(torch.nn.Module, module)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: WanVaeConfig) -> VaeFacts:
        release = config.release
        return VaeFacts(
            latents=LatentFacts(
                channels=release.channels,
                pixels=release.pixels,
                frames=FRAMES_PER_LATENT,
                scaling=SCALING,
                space=release.space,
            ),
            image_channels=IMAGE_CHANNELS,
            has_encoder=config.has_encoder,
        )

    @cached_property
    def _bands(self) -> Bands:
        return whole_group()

    def shares(self, model: Model[WanVaeConfig], latents: torch.Tensor) -> bool:
        if latents.ndim not in (4, 5):
            return False
        height, width = latents.shape[-2:]
        return self._bands.are_worth_it(height, width, model.config.release.pixels)

    def shares_encode(self, model: Model[WanVaeConfig], image: torch.Tensor) -> bool:
        pixels = model.config.release.pixels
        if image.ndim not in (4, 5) or any(side % pixels for side in image.shape[-2:]):
            return False
        height, width = image.shape[-2:]
        return self._bands.are_worth_it(height // pixels, width // pixels, pixels)

    @torch.inference_mode()
    def decode(
        self, model: Model[WanVaeConfig], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> Generator[torch.Tensor]:
        release = model.config.release
        if latents.ndim not in (4, 5) or latents.shape[1] != release.channels or 0 in latents.shape:
            sides = f"height / {release.pixels}, width / {release.pixels}]"
            raise BadRequest(
                f"latents are {list(latents.shape)}: use [batch, {release.channels}, {sides}, or of videos "
                f"[batch, {release.channels}, (frames - 1) / {FRAMES_PER_LATENT} + 1, {sides}"
            )
        check_latent_size(latents, release.pixels)
        vae = cast(AutoencoderKLWan, model.module)
        (latents,) = prepare(model, latents=latents)
        means, deviations = _statistics(release, latents)
        # As the pipelines do it, for the same bits: the deviation is inverted twice.
        z = (latents / scaling.factor + scaling.shift) / (1.0 / deviations) + means
        is_image = z.ndim == 4
        x = vae.post_quant_conv(z.unsqueeze(2) if is_image else z)
        split = _Split(self._bands if is_shared else None, x.shape[3])
        x = split.own_rows(x)
        # Not vae.decode, which clamps. The first frame of a video has no frames before it in any cache.
        cache = _empty_cache(vae.decoder)
        for number in range(x.shape[2]):
            with split.running(vae.decoder):
                chunk = vae.decoder(
                    x[:, :, number : number + 1], feat_cache=cache, feat_idx=[0], first_chunk=number == 0
                )
            chunk = split.all_rows(unpatchify(chunk, release.patch))
            yield chunk[:, :, 0] if is_image else chunk

    @torch.inference_mode()
    def encode(
        self, model: Model[WanVaeConfig], image: torch.Tensor, scaling: LatentScaling, *, is_shared: bool = False
    ) -> torch.Tensor:
        check_has_encoder(model.config.has_encoder)
        if image.ndim not in (4, 5) or image.shape[1] != IMAGE_CHANNELS or not 0 < image.shape[0] <= MAX_BATCH:
            raise BadRequest(
                f"image is {list(image.shape)}: use [batch, {IMAGE_CHANNELS}, height, width], or of videos "
                f"[batch, {IMAGE_CHANNELS}, frames, height, width]"
            )
        release = model.config.release
        check_sides(image.shape[-2], image.shape[-1], release.pixels)
        if image.ndim == 5:
            self.facts(model.config).latents.check_frames(image.shape[2])
        vae = cast(AutoencoderKLWan, model.module)
        (image,) = prepare(model, image=image)
        is_image = image.ndim == 4
        x = image.unsqueeze(2) if is_image else image
        split = _Split(self._bands if is_shared else None, x.shape[3] // release.pixels)
        x = patchify(split.own_rows(x), release.patch)
        cache = _empty_cache(vae.encoder)
        frames = x.shape[2]
        starts = [0, *range(1, frames, FRAMES_PER_LATENT)]
        with split.running(vae.encoder):
            moments = [
                vae.encoder(x[:, :, start:end], feat_cache=cache, feat_idx=[0])
                for start, end in zip(starts, [*starts[1:], frames], strict=True)
            ]
        z = vae.quant_conv(split.all_rows(torch.cat(moments, 2)))[:, : release.channels]
        # Pipelines of images divide in the VAE's dtype; those of videos multiply in float32.
        z = z[:, :, 0] if is_image else z.float()
        means, deviations = _statistics(release, z)
        normal = (z - means) / deviations if is_image else (z - means) * (1.0 / deviations)
        return (normal - scaling.shift) * scaling.factor

    @torch.inference_mode()
    def sample(
        self,
        model: Model[WanVaeConfig],
        image: torch.Tensor,
        scaling: LatentScaling,
        draw: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> torch.Tensor:
        """Encode images to samples of the posterior, with the noise that ``draw`` gives."""
        check_has_encoder(model.config.has_encoder)
        if image.ndim != 4 or image.shape[1] != IMAGE_CHANNELS or not 0 < image.shape[0] <= MAX_BATCH:
            raise BadRequest(f"image is {list(image.shape)}: use [batch, {IMAGE_CHANNELS}, height, width]")
        release = model.config.release
        check_sides(image.shape[-2], image.shape[-1], release.pixels)
        (image,) = prepare(model, image=image)
        found = cast(AutoencoderKLWan, model.module).encode(image.unsqueeze(2)).latent_dist
        noise = draw(tuple(found.mean.shape), found.mean.dtype).to(found.mean.device)
        z = found.mean + found.std * noise
        means, deviations = _statistics(release, z)
        return (((z - means) * (1.0 / deviations) - scaling.shift) * scaling.factor)[:, :, 0]


class _Split:
    """The rows of one decode or encode: all of them on this rank alone, or a band of them on each rank."""

    def __init__(self, bands: Bands | None, rows: int) -> None:
        """``rows`` are those of the latents; ``bands`` is ``None`` for one rank."""
        self._bands = bands
        self._rows = rows
        self._shares = [] if bands is None else bands.shares(rows)

    def own_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of (batch, channels, frames, rows or a multiple of them, columns)."""
        if self._bands is None:
            return x
        scale, mine = x.shape[3] // self._rows, self._bands.rank
        return x.narrow(3, sum(self._shares[:mine]) * scale, self._shares[mine] * scale)

    def all_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return all rows of what each rank has its own of; every rank gets them."""
        if self._bands is None:
            return x
        return self._bands.gather_rows(x.movedim(3, 0), self._shares).movedim(0, 3)

    def running(self, side: torch.nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self._bands is None else rows_split(side, self._bands, self._rows)


def _empty_cache(side: torch.nn.Module) -> list[Any]:
    """Return an empty cache of frames for each causal convolution of an encoder or decoder."""
    return [None] * sum(isinstance(each, WanCausalConv3d) for each in side.modules())


def _statistics(release: Release, like: torch.Tensor) -> list[torch.Tensor]:
    """Return means and deviations of the channels, (1, channels, 1, 1) each, or with one more dimension."""
    shape = (1, -1, *(1 for _ in like.shape[2:]))
    return [torch.tensor(each).view(shape).to(like.device, like.dtype) for each in (release.means, release.deviations)]
