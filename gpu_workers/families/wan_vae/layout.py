"""The tensors of the VAE by diffusers' names, with the names that the original files and ComfyUI's have for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xditd.gpu_workers.families.wan_vae.config import (
    IMAGE_CHANNELS,
    IN_TIME,
    LATENT_CHANNELS,
    RESIDUALS,
    WIDTHS,
    WanVaeConfig,
)
from xditd.gpu_workers.models.entries import Shape

_CUBE: Final = (3, 3, 3)
_LEVELS: Final = len(WIDTHS)


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution (``shape`` is that of its weight, it has a bias) or a norm (``gamma`` alone)."""

    name: str
    original: str
    shape: Shape
    is_norm: bool = False


def layers(config: WanVaeConfig) -> Iterator[Layer]:
    """Yield all layers of a VAE."""
    double = 2 * LATENT_CHANNELS
    if config.has_encoder:
        yield from _encoder(config.width)
        yield Layer("quant_conv", "conv1", (double, double, 1, 1, 1))
    yield Layer("post_quant_conv", "conv2", (LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1))
    yield from _decoder(config.width)


def _encoder(base: int) -> Iterator[Layer]:
    widths = [base * each for each in WIDTHS]
    yield Layer("encoder.conv_in", "encoder.conv1", (base, IMAGE_CHANNELS, *_CUBE))
    width, number = base, 0
    for level, out in enumerate(widths):
        for _ in range(RESIDUALS):
            names = f"encoder.down_blocks.{number}", f"encoder.downsamples.{number}"
            yield from _residual(*names, width, out)
            width, number = out, number + 1
        if level < _LEVELS - 1:
            names = f"encoder.down_blocks.{number}", f"encoder.downsamples.{number}"
            yield from _resample(*names, out, out, out if IN_TIME[level] else None)
            number += 1
    yield from _middle("encoder", width)
    yield Layer("encoder.norm_out", "encoder.head.0", (width, 1, 1, 1), is_norm=True)
    yield Layer("encoder.conv_out", "encoder.head.2", (2 * LATENT_CHANNELS, width, *_CUBE))


def _decoder(base: int) -> Iterator[Layer]:
    widths = [base * each for each in reversed(WIDTHS)]
    width = widths[0]
    yield Layer("decoder.conv_in", "decoder.conv1", (width, LATENT_CHANNELS, *_CUBE))
    yield from _middle("decoder", width)
    for level, out in enumerate(widths):
        block, first = f"decoder.up_blocks.{level}", level * (RESIDUALS + 2)
        for number in range(RESIDUALS + 1):
            yield from _residual(f"{block}.resnets.{number}", f"decoder.upsamples.{first + number}", width, out)
            width = out
        if level < _LEVELS - 1:
            in_time = 2 * out if IN_TIME[::-1][level] else None
            names = f"{block}.upsamplers.0", f"decoder.upsamples.{first + RESIDUALS + 1}"
            yield from _resample(*names, out, out // 2, in_time)
            width = out // 2
    yield Layer("decoder.norm_out", "decoder.head.0", (width, 1, 1, 1), is_norm=True)
    yield Layer("decoder.conv_out", "decoder.head.2", (IMAGE_CHANNELS, width, *_CUBE))


def _residual(name: str, original: str, width: int, out: int) -> Iterator[Layer]:
    yield Layer(f"{name}.norm1", f"{original}.residual.0", (width, 1, 1, 1), is_norm=True)
    yield Layer(f"{name}.conv1", f"{original}.residual.2", (out, width, *_CUBE))
    yield Layer(f"{name}.norm2", f"{original}.residual.3", (out, 1, 1, 1), is_norm=True)
    yield Layer(f"{name}.conv2", f"{original}.residual.6", (out, out, *_CUBE))
    if width != out:
        yield Layer(f"{name}.conv_shortcut", f"{original}.shortcut", (out, width, 1, 1, 1))


def _resample(name: str, original: str, width: int, out: int, in_time: int | None) -> Iterator[Layer]:
    yield Layer(f"{name}.resample.1", f"{original}.resample.1", (out, width, 3, 3))
    if in_time is not None:
        yield Layer(f"{name}.time_conv", f"{original}.time_conv", (in_time, width, 3, 1, 1))


def _middle(side: str, width: int) -> Iterator[Layer]:
    for number in range(2):
        yield from _residual(f"{side}.mid_block.resnets.{number}", f"{side}.middle.{2 * number}", width, width)
    name, original = f"{side}.mid_block.attentions.0", f"{side}.middle.1"
    yield Layer(f"{name}.norm", f"{original}.norm", (width, 1, 1), is_norm=True)
    yield Layer(f"{name}.to_qkv", f"{original}.to_qkv", (3 * width, width, 1, 1))
    yield Layer(f"{name}.proj", f"{original}.proj", (width, width, 1, 1))
