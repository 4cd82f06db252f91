"""The VAE of FLUX.1 (``ae.safetensors``) and VAEs of the same structure, in ldm naming, whole or decoder only.

Widths, depth and the mid attention are read from shapes. The tensors do not show the 32 groups of the norms and the
scaling of latents. SD3's VAE has the same structure and names with another scaling, and is of this family: the
transformer's facts give the scaling of its latents. Without a transformer, jobs use FLUX.1's.

Source: diffusers, ``convert_ldm_vae_checkpoint``; a test compares every element.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from xditd.gpu_workers.families.flux_vae.config import (
    IMAGE_CHANNELS,
    LATENT_CHANNELS,
    LEVELS,
    NORM_GROUPS,
    FluxVaeConfig,
)
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux_vae.operations import FluxVaeOperations

MAX_RESIDUALS = 16

_UP = re.compile(r"^decoder\.up\.(\d+)\.block\.(\d+)\.")
_CONVS = ("conv1", "conv2")
_MARKS = {"decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight", "decoder.conv_out.weight"}


class FluxVae:
    """The family of FLUX.1's VAE: see the module's docstring."""

    name = "flux_vae"
    title = "the VAE of FLUX.1 (ae.safetensors)"
    kind: Kind = "vae"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()

    def claims(self, names: Collection[str]) -> bool:
        # The VAEs of Wan and Qwen-Image, in diffusers' names, share some of these, and have norms of gamma alone.
        return not _MARKS.isdisjoint(names) and not any(name.endswith(".gamma") for name in names)

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> FluxVaeConfig:
        blocks = [(int(found[1]), int(found[2])) for found in map(_UP.match, shapes) if found]
        levels = max((level for level, _ in blocks), default=-1) + 1
        if levels != LEVELS:
            raise Unsupported(f"flux_vae: {levels} levels of resolution, not {LEVELS}: not the VAE of FLUX.1")
        if any(number > MAX_RESIDUALS for _, number in blocks):
            raise BadCheckpoint(f"flux_vae: more than {MAX_RESIDUALS} residual blocks in one level")
        # The decoder has one block more than the encoder in each level.
        residuals = Counter(
            max(number for at, number in blocks if at == level) for level in {at for at, _ in blocks}
        ).most_common(1)[0][0]
        channels = tuple(
            vote(
                self.name,
                f"the width of decoder.up.{level}",
                shapes,
                [(f"decoder.up.{level}.block.{i}.{part}.weight", 0) for i in range(residuals + 1) for part in _CONVS],
            )
            for level in range(levels)
        )
        for width in channels:
            if width % NORM_GROUPS:
                raise BadCheckpoint(f"flux_vae: {width} channels do not divide into {NORM_GROUPS} norm groups")
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
        )

    def entries(self, config: FluxVaeConfig, names: Collection[str]) -> Iterator[Entry]:
        top = config.channels[-1]
        if config.has_encoder:
            yield from _conv("encoder.conv_in", config.channels[0], IMAGE_CHANNELS, "encoder.conv_in")
            width = config.channels[0]
            for level, out in enumerate(config.channels):
                for i in range(config.residuals):
                    yield from _residual(
                        f"encoder.down.{level}.block.{i}", width, out, f"encoder.down_blocks.{level}.resnets.{i}"
                    )
                    width = out
                if level < LEVELS - 1:
                    yield from _conv(
                        f"encoder.down.{level}.downsample.conv",
                        out,
                        out,
                        f"encoder.down_blocks.{level}.downsamplers.0.conv",
                    )
            yield from _middle("encoder", top, config.has_mid_attention)
            yield from layer_entries("encoder.norm_out", (top,), "encoder.conv_norm_out")
            yield from _conv("encoder.conv_out", 2 * LATENT_CHANNELS, top, "encoder.conv_out")
        yield from _conv("decoder.conv_in", top, LATENT_CHANNELS, "decoder.conv_in")
        yield from _middle("decoder", top, config.has_mid_attention)
        width = top
        for level in reversed(range(LEVELS)):
            out = config.channels[level]
            target = f"decoder.up_blocks.{LEVELS - 1 - level}"
            for i in range(config.residuals + 1):
                yield from _residual(f"decoder.up.{level}.block.{i}", width, out, f"{target}.resnets.{i}")
                width = out
            if level > 0:
                yield from _conv(f"decoder.up.{level}.upsample.conv", out, out, f"{target}.upsamplers.0.conv")
        yield from layer_entries("decoder.norm_out", (width,), "decoder.conv_norm_out")
        yield from _conv("decoder.conv_out", IMAGE_CHANNELS, width, "decoder.conv_out")

    def heads(self, config: FluxVaeConfig) -> int:
        return 0

    @property
    def operations(self) -> FluxVaeOperations:
        from xditd.gpu_workers.families.flux_vae.operations import FluxVaeOperations

        return FluxVaeOperations()


def _conv(source: str, out: int, width: int, target: str, size: int = 3) -> Iterator[Entry]:
    return layer_entries(source, (out, width, size, size), target)


def _residual(source: str, width: int, out: int, target: str) -> Iterator[Entry]:
    yield from layer_entries(f"{source}.norm1", (width,), f"{target}.norm1")
    yield from _conv(f"{source}.conv1", out, width, f"{target}.conv1")
    yield from layer_entries(f"{source}.norm2", (out,), f"{target}.norm2")
    yield from _conv(f"{source}.conv2", out, out, f"{target}.conv2")
    if width != out:
        yield from _conv(f"{source}.nin_shortcut", out, width, f"{target}.conv_shortcut", size=1)


def _middle(side: str, width: int, has_attention: bool) -> Iterator[Entry]:
    yield from _residual(f"{side}.mid.block_1", width, width, f"{side}.mid_block.resnets.0")
    if has_attention:
        target = f"{side}.mid_block.attentions.0"
        yield from layer_entries(f"{side}.mid.attn_1.norm", (width,), f"{target}.group_norm")
        for source, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            name = f"{side}.mid.attn_1.{source}"
            yield Entry(f"{name}.weight", (width, width, 1, 1), ((f"{target}.{part}.weight", width),), (width, width))
            yield tensor_entry(f"{name}.bias", (width,), f"{target}.{part}.bias")
    yield from _residual(f"{side}.mid.block_2", width, width, f"{side}.mid_block.resnets.1")
