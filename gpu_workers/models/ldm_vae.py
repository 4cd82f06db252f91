"""The tensors of a VAE with diffusers' ``Encoder`` and ``Decoder``, in ldm naming: sizes from shapes, and entries.

Source: diffusers, ``convert_ldm_vae_checkpoint``; tests of the families compare every element.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.shapes import vote
from xditd.ipc.errors import BadCheckpoint

IMAGE_CHANNELS: Final = 3
NORM_GROUPS: Final = 32
MAX_RESIDUALS: Final = 16

_UP: Final = re.compile(r"^decoder\.up\.(\d+)\.block\.(\d+)\.")
_CONVS: Final = ("conv1", "conv2")


_DIFFUSERS_BLOCKS: Final = re.compile(
    r"^(?:encoder\.down|decoder\.up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers\.0)\.(.*)$"
)
_DIFFUSERS: Final = (
    (re.compile(r"^(encoder|decoder)\.mid_block\.resnets\.0\."), r"\1.mid.block_1."),
    (re.compile(r"^(encoder|decoder)\.mid_block\.resnets\.1\."), r"\1.mid.block_2."),
    (re.compile(r"^(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\."), r"\1.mid.attn_1.norm."),
    (re.compile(r"^(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\."), r"\1.mid.attn_1.\2."),
    (re.compile(r"^(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\."), r"\1.mid.attn_1.proj_out."),
    (re.compile(r"^(encoder|decoder)\.conv_norm_out\."), r"\1.norm_out."),
)


def ldm_name(name: str, levels: int) -> str:
    """Return ldm's name for a tensor of a VAE of so many levels in diffusers' naming; others stay as they are."""
    found = _DIFFUSERS_BLOCKS.match(name)
    if found:
        side = "encoder.down" if name.startswith("encoder.") else "decoder.up"
        # diffusers numbers the decoder's levels in the order in which they run.
        level = int(found[1]) if side == "encoder.down" else levels - 1 - int(found[1])
        if found[2] is None:
            return f"{side}.{level}.{'down' if side == 'encoder.down' else 'up'}sample.{found[3]}"
        return f"{side}.{level}.block.{found[2]}.{found[3].replace('conv_shortcut.', 'nin_shortcut.')}"
    for pattern, ldm in _DIFFUSERS:
        name = pattern.sub(ldm, name)
    return name


def count_levels(family: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Return the levels of resolution, and the residual blocks of each in an encoder, from the decoder's tensors.

    Raises:
        BadCheckpoint: a level has too many blocks.
    """
    blocks = [(int(found[1]), int(found[2])) for found in map(_UP.match, shapes) if found]
    levels = max((level for level, _ in blocks), default=-1) + 1
    if any(number > MAX_RESIDUALS for _, number in blocks):
        raise BadCheckpoint(f"{family}: more than {MAX_RESIDUALS} residual blocks in one level")
    # The decoder has one block more than the encoder in each level.
    most = Counter(max(number for at, number in blocks if at == level) for level in {at for at, _ in blocks})
    return levels, most.most_common(1)[0][0] if most else 0


def decoder_widths(family: str, shapes: Mapping[str, Shape], levels: int, residuals: int) -> tuple[int, ...]:
    """Return the decoder's channels by level, from the full resolution down; see :func:`_widths`."""
    return _widths(family, shapes, "decoder.up", levels, residuals + 1)


def encoder_widths(family: str, shapes: Mapping[str, Shape], levels: int, residuals: int) -> tuple[int, ...]:
    """Return the encoder's channels by level, from the full resolution down; see :func:`_widths`."""
    return _widths(family, shapes, "encoder.down", levels, residuals)


def _widths(family: str, shapes: Mapping[str, Shape], side: str, levels: int, blocks: int) -> tuple[int, ...]:
    """Return the channels of each level by the majority of its tensors.

    Raises:
        BadCheckpoint: no tensor of a level shows it, or it does not divide into the groups of norms.
    """
    channels = tuple(
        vote(
            family,
            f"the width of {side}.{level}",
            shapes,
            [(f"{side}.{level}.block.{i}.{part}.weight", 0) for i in range(blocks) for part in _CONVS],
        )
        for level in range(levels)
    )
    for width in channels:
        if width % NORM_GROUPS:
            raise BadCheckpoint(f"{family}: {width} channels do not divide into {NORM_GROUPS} norm groups")
    return channels


def encoder_entries(
    channels: tuple[int, ...], residuals: int, moments: int, *, has_attention: bool, linear_attention: bool = False
) -> Iterator[Entry]:
    """List the encoder's tensors. ``moments`` are its results' channels: means and variances of latents.

    With ``linear_attention`` the projections of its attention are matrices, else 1x1 convolutions.
    """
    yield from conv_entries("encoder.conv_in", channels[0], IMAGE_CHANNELS, "encoder.conv_in")
    width = channels[0]
    for level, out in enumerate(channels):
        for i in range(residuals):
            yield from _residual(
                f"encoder.down.{level}.block.{i}", width, out, f"encoder.down_blocks.{level}.resnets.{i}"
            )
            width = out
        if level < len(channels) - 1:
            target = f"encoder.down_blocks.{level}.downsamplers.0.conv"
            yield from conv_entries(f"encoder.down.{level}.downsample.conv", out, out, target)
    yield from _middle("encoder", width, has_attention, linear_attention)
    yield from layer_entries("encoder.norm_out", (width,), "encoder.conv_norm_out")
    yield from conv_entries("encoder.conv_out", moments, width, "encoder.conv_out")


def decoder_entries(
    channels: tuple[int, ...], residuals: int, latents: int, *, has_attention: bool, linear_attention: bool = False
) -> Iterator[Entry]:
    """List the decoder's tensors, for this many channels of latents; else as :func:`encoder_entries`."""
    levels, width = len(channels), channels[-1]
    yield from conv_entries("decoder.conv_in", width, latents, "decoder.conv_in")
    yield from _middle("decoder", width, has_attention, linear_attention)
    for level in reversed(range(levels)):
        out = channels[level]
        target = f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(residuals + 1):
            yield from _residual(f"decoder.up.{level}.block.{i}", width, out, f"{target}.resnets.{i}")
            width = out
        if level > 0:
            yield from conv_entries(f"decoder.up.{level}.upsample.conv", out, out, f"{target}.upsamplers.0.conv")
    yield from layer_entries("decoder.norm_out", (width,), "decoder.conv_norm_out")
    yield from conv_entries("decoder.conv_out", IMAGE_CHANNELS, width, "decoder.conv_out")


def conv_entries(source: str, out: int, width: int, target: str, size: int = 3) -> Iterator[Entry]:
    """Describe a convolution of ``size`` x ``size``."""
    return layer_entries(source, (out, width, size, size), target)


def _residual(source: str, width: int, out: int, target: str) -> Iterator[Entry]:
    yield from layer_entries(f"{source}.norm1", (width,), f"{target}.norm1")
    yield from conv_entries(f"{source}.conv1", out, width, f"{target}.conv1")
    yield from layer_entries(f"{source}.norm2", (out,), f"{target}.norm2")
    yield from conv_entries(f"{source}.conv2", out, out, f"{target}.conv2")
    if width != out:
        yield from conv_entries(f"{source}.nin_shortcut", out, width, f"{target}.conv_shortcut", size=1)


def _middle(side: str, width: int, has_attention: bool, linear_attention: bool) -> Iterator[Entry]:
    yield from _residual(f"{side}.mid.block_1", width, width, f"{side}.mid_block.resnets.0")
    if has_attention:
        target = f"{side}.mid_block.attentions.0"
        yield from layer_entries(f"{side}.mid.attn_1.norm", (width,), f"{target}.group_norm")
        for source, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            name, weight = f"{side}.mid.attn_1.{source}", f"{target}.{part}.weight"
            if linear_attention:
                yield tensor_entry(f"{name}.weight", (width, width), weight)
            else:
                yield Entry(f"{name}.weight", (width, width, 1, 1), ((weight, width),), (width, width))
            yield tensor_entry(f"{name}.bias", (width,), f"{target}.{part}.bias")
    yield from _residual(f"{side}.mid.block_2", width, width, f"{side}.mid_block.resnets.1")
