"""The tensors of the VAE by diffusers' names, with the names that the original files and ComfyUI's have for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xditd.gpu_workers.families.wan_vae.config import IN_TIME, RESIDUALS, WIDTHS, WanVaeConfig
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
    channels = config.release.channels
    if config.has_encoder:
        yield from _encoder(config)
        yield Layer("quant_conv", "conv1", (2 * channels, 2 * channels, 1, 1, 1))
    yield Layer("post_quant_conv", "conv2", (channels, channels, 1, 1, 1))
    yield from _decoder(config)


def _encoder(config: WanVaeConfig) -> Iterator[Layer]:
    release, base = config.release, config.encoder_width or config.width
    yield Layer("encoder.conv_in", "encoder.conv1", (base, release.planes, *_CUBE))
    width, number = base, 0
    for level, out in enumerate(base * each for each in WIDTHS):
        for index in range(RESIDUALS + (level < _LEVELS - 1)):
            if release.has_averages:
                name, original = f"encoder.down_blocks.{level}", f"encoder.downsamples.{level}.downsamples.{index}"
                name = f"{name}.resnets.{index}" if index < RESIDUALS else f"{name}.downsampler"
            else:
                name, original = f"encoder.down_blocks.{number}", f"encoder.downsamples.{number}"
            if index < RESIDUALS:
                yield from _residual(name, original, width, out)
            else:
                yield from _resample(name, original, out, out, out if IN_TIME[level] else None)
            width, number = out, number + 1
    yield from _middle("encoder", width)
    yield Layer("encoder.norm_out", "encoder.head.0", (width, 1, 1, 1), is_norm=True)
    yield Layer("encoder.conv_out", "encoder.head.2", (2 * release.channels, width, *_CUBE))


def _decoder(config: WanVaeConfig) -> Iterator[Layer]:
    release, base = config.release, config.width
    width = base * WIDTHS[-1]
    yield Layer("decoder.conv_in", "decoder.conv1", (width, release.channels, *_CUBE))
    yield from _middle("decoder", width)
    for level, out in enumerate(base * each for each in reversed(WIDTHS)):
        block, first = f"decoder.up_blocks.{level}", level * (RESIDUALS + 2)
        # The levels of Wan 2.2 are modules of their own, and keep their width when the resolution doubles.
        originals = f"decoder.upsamples.{level}.upsamples." if release.has_averages else "decoder.upsamples."
        first = 0 if release.has_averages else first
        for index in range(RESIDUALS + 1):
            yield from _residual(f"{block}.resnets.{index}", f"{originals}{first + index}", width, out)
            width = out
        if level < _LEVELS - 1:
            in_time = 2 * out if IN_TIME[::-1][level] else None
            name, wide = ("upsampler", out) if release.has_averages else ("upsamplers.0", out // 2)
            yield from _resample(f"{block}.{name}", f"{originals}{first + RESIDUALS + 1}", out, wide, in_time)
            width = wide
    yield Layer("decoder.norm_out", "decoder.head.0", (width, 1, 1, 1), is_norm=True)
    yield Layer("decoder.conv_out", "decoder.head.2", (release.planes, width, *_CUBE))


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
