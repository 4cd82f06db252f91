"""The VAE of FLUX.1 (``ae.safetensors``) and VAEs of the same structure, in ldm naming or diffusers'.

They are whole, or a decoder only.

Widths, depth and the mid attention are read from shapes. The tensors do not show the 32 groups of the norms and the
scaling of latents. SD3's VAE has the same structure and names with another scaling, and is of this family: the
transformer's facts give the scaling of its latents. Without a transformer, jobs use FLUX.1's.

Source: diffusers, ``convert_ldm_vae_checkpoint``; a test compares every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from xditd.gpu_workers.families.flux_vae.config import LATENT_CHANNELS, LEVELS, FluxVaeConfig
from xditd.gpu_workers.models.entries import Entry, Shape
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.ldm_vae import count_levels, decoder_entries, decoder_widths, encoder_entries, ldm_name
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux_vae.operations import FluxVaeOperations

_MARKS = {"decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight", "decoder.conv_out.weight"}
_PROJECTIONS = ("decoder.mid.attn_1.q.weight", "decoder.mid.attn_1.proj_out.weight")
_IN_DIFFUSERS = "decoder.mid_block.resnets.0.conv1.weight"
_OTHER = "post_quant_conv.weight"
_FOREIGN = "bn.running_mean"
"""Statistics by which FLUX.2's VAE, of the same names, normalises its latents."""


class FluxVae:
    """The family of FLUX.1's VAE: see the module's docstring."""

    name = "flux_vae"
    title = "the VAE of FLUX.1 (ae.safetensors)"
    kind: Kind = "vae"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()

    def claims(self, names: Collection[str]) -> bool:
        # FLUX.2's VAE has statistics; those of Wan and Qwen-Image, in diffusers' names, have norms of gamma alone.
        is_another = _FOREIGN in names or any(name.endswith(".gamma") for name in names)
        # Those of other models in diffusers' names have 1x1 convolutions beside the latents.
        has_marks = not _MARKS.isdisjoint(names)
        return has_marks and not is_another and not (_IN_DIFFUSERS in names and _OTHER in names)

    def canonical(self, name: str) -> str:
        return ldm_name(name, LEVELS)

    def configure(self, shapes: Mapping[str, Shape]) -> FluxVaeConfig:
        levels, residuals = count_levels(self.name, shapes)
        if levels != LEVELS:
            raise Unsupported(f"flux_vae: {levels} levels of resolution, not {LEVELS}: not the VAE of FLUX.1")
        channels = decoder_widths(self.name, shapes, levels, residuals)
        latent = shapes.get("decoder.conv_in.weight", ())
        if len(latent) == 4 and latent[1] != LATENT_CHANNELS:
            raise Unsupported(
                f"flux_vae: {latent[1]} latent channels, not {LATENT_CHANNELS}: not the VAE of FLUX.1 (Stable "
                "Diffusion 1, 2 and XL have 4, FLUX.2 has 32); lend ae.safetensors"
            )
        return FluxVaeConfig(
            channels=channels,
            residuals=residuals,
            has_mid_attention=any(name.startswith("decoder.mid.attn_1.") for name in shapes),
            has_encoder=any(name.startswith("encoder.") for name in shapes),
            has_linear_attention=all(len(shapes.get(name, ())) == 2 for name in _PROJECTIONS),
        )

    def entries(self, config: FluxVaeConfig, names: Collection[str]) -> Iterator[Entry]:
        attention = {
            "has_attention": config.has_mid_attention,
            "linear_attention": config.has_linear_attention,
        }
        if config.has_encoder:
            yield from encoder_entries(config.channels, config.residuals, 2 * LATENT_CHANNELS, **attention)
        yield from decoder_entries(config.channels, config.residuals, LATENT_CHANNELS, **attention)

    def heads(self, config: FluxVaeConfig) -> int:
        return 0

    @property
    def operations(self) -> FluxVaeOperations:
        from xditd.gpu_workers.families.flux_vae.operations import FluxVaeOperations

        return FluxVaeOperations()
