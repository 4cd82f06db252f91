"""The VAE of FLUX.2 (``flux2-vae.safetensors``), whole or decoder only, in ldm's naming and in diffusers'.

Its tensors are those of FLUX.1's VAE with 32 channels, 1x1 convolutions beside the latents, and the running mean and
variance of a batch norm, which normalise latents. Widths and depth are read from shapes.

Sources: diffusers, ``convert_ldm_vae_checkpoint``, and ComfyUI, ``diffusers_convert.py``, for names; a test compares
every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.flux2_vae.config import LATENT_CHANNELS, LEVELS, Z_CHANNELS, Flux2VaeConfig
from xditd.gpu_workers.models.entries import Entry, Shape, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.ldm_vae import (
    conv_entries,
    count_levels,
    decoder_entries,
    decoder_widths,
    encoder_entries,
    encoder_widths,
    ldm_name,
)
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux2_vae.operations import Flux2VaeOperations

_MARK: Final = "bn.running_mean"
_DECODER: Final = "decoder.conv_in.weight"
_PLAIN: Final = "not the VAE of FLUX.2; lend flux2-vae.safetensors"

_RENAMED: Final = (
    # Black Forest Labs' own modules have these inside of the encoder and the decoder.
    (re.compile(r"^encoder\.quant_conv\."), "quant_conv."),
    (re.compile(r"^decoder\.post_quant_conv\."), "post_quant_conv."),
)


class Flux2Vae:
    """The family of FLUX.2's VAE: see the module's docstring."""

    name = "flux2_vae"
    title = "the VAE of FLUX.2 (flux2-vae.safetensors)"
    kind: Kind = "vae"
    tied: Mapping[str, str] = {}
    # A count of training.
    ignored: re.Pattern[str] | None = re.compile(r"^bn\.num_batches_tracked$")
    fused_widths: tuple[int, ...] = ()

    def claims(self, names: Collection[str]) -> bool:
        return _MARK in names and _DECODER in names

    def canonical(self, name: str) -> str:
        for pattern, ldm in _RENAMED:
            name = pattern.sub(ldm, name)
        return ldm_name(name, LEVELS)

    def configure(self, shapes: Mapping[str, Shape]) -> Flux2VaeConfig:
        levels, residuals = count_levels(self.name, shapes)
        if levels != LEVELS:
            raise Unsupported(f"flux2_vae: {levels} levels of resolution, not {LEVELS}: {_PLAIN}")
        for name, channels, dimension in ((_DECODER, Z_CHANNELS, 1), (_MARK, LATENT_CHANNELS, 0)):
            shape = shapes.get(name, ())
            if len(shape) > dimension and shape[dimension] != channels:
                raise Unsupported(f"flux2_vae: {name} has {shape[dimension]} channels, not {channels}: {_PLAIN}")
        has_encoder = any(name.startswith("encoder.") for name in shapes)
        return Flux2VaeConfig(
            channels=decoder_widths(self.name, shapes, levels, residuals),
            encoder_channels=encoder_widths(self.name, shapes, levels, residuals) if has_encoder else (),
            residuals=residuals,
            has_quant_conv=any(name.startswith("post_quant_conv.") for name in shapes),
            has_linear_attention=len(shapes.get("decoder.mid.attn_1.q.weight", ())) == 2,
        )

    def entries(self, config: Flux2VaeConfig, names: Collection[str]) -> Iterator[Entry]:
        attention = {"has_attention": True, "linear_attention": config.has_linear_attention}
        moments = 2 * Z_CHANNELS
        if config.has_encoder:
            yield from encoder_entries(config.encoder_channels, config.residuals, moments, **attention)
            if config.has_quant_conv:
                yield from conv_entries("quant_conv", moments, moments, "quant_conv", size=1)
        yield from decoder_entries(config.channels, config.residuals, Z_CHANNELS, **attention)
        if config.has_quant_conv:
            yield from conv_entries("post_quant_conv", Z_CHANNELS, Z_CHANNELS, "post_quant_conv", size=1)
        for statistic in ("running_mean", "running_var"):
            yield tensor_entry(f"bn.{statistic}", (LATENT_CHANNELS,))

    def heads(self, config: Flux2VaeConfig) -> int:
        return 0

    @cached_property
    def operations(self) -> Flux2VaeOperations:
        from xditd.gpu_workers.families.flux2_vae.operations import Flux2VaeOperations

        return Flux2VaeOperations()
