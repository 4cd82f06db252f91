"""The VAEs of Wan and Qwen-Image, in the naming of the original files and ComfyUI's, and in that of diffusers.

Files of Wan 2.1 and Qwen-Image have the same tensors with other values, and their latents the same means and
deviations. That of Wan 2.2 TI2V has names of its own. Widths are read from shapes. VAEs of images with transparency are
refused by name.

Sources: diffusers, ``convert_wan_vae_to_diffusers``, and Wan 2.2's ``vae2_2.py``; tests compare every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.wan_vae.config import WAN_2_1, WAN_2_2, WanVaeConfig
from xditd.gpu_workers.families.wan_vae.layout import layers
from xditd.gpu_workers.models.entries import Entry, Shape, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import vote
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.wan_vae.operations import WanVaeOperations

_ORIGINAL: Final = "decoder.middle.0.residual.0.gamma"
_DIFFUSERS: Final = "decoder.mid_block.resnets.0.norm1.gamma"
_MARKS: Final = {_ORIGINAL, _DIFFUSERS, "decoder.head.0.gamma", "decoder.norm_out.gamma"}
_OF_WAN_2_2: Final = ("decoder.upsamples.0.upsamples.", "decoder.up_blocks.0.upsampler.")
_PLAIN: Final = "lend qwen_image_vae.safetensors, wan_2.1_vae.safetensors or wan2.2_vae.safetensors"


class WanVae:
    """The family of this VAE: see the module's docstring."""

    name = "wan_vae"
    title = "the VAE of Qwen-Image or Wan (wan_2.1_vae.safetensors)"
    kind: Kind = "vae"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()
    same_classes = frozenset({"AutoencoderKLQwenImage"})
    """Other classes of diffusers that compute the same."""

    def claims(self, names: Collection[str]) -> bool:
        return not _MARKS.isdisjoint(names)

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> WanVaeConfig:
        is_wan_2_2 = any(name.startswith(_OF_WAN_2_2) for name in shapes)
        release = WAN_2_2 if is_wan_2_2 else WAN_2_1
        is_original = _is_original(shapes)
        inner, outer = ("conv2", "decoder.head.2") if is_original else ("post_quant_conv", "decoder.conv_out")
        first, norm = ("decoder.conv1", "decoder.head.0") if is_original else ("decoder.conv_in", "decoder.norm_out")
        encoder = "encoder.conv1" if is_original else "encoder.conv_in"
        latent = vote(
            self.name,
            "latent channels",
            shapes,
            [(f"{inner}.weight", 0), (f"{inner}.bias", 0), (f"{first}.weight", 1)],
            release.channels,
        )
        if latent != release.channels:
            raise Unsupported(f"wan_vae: {latent} latent channels, not {release.channels}: {_PLAIN}")
        out = vote(self.name, "image channels", shapes, [(f"{outer}.weight", 0), (f"{outer}.bias", 0)], release.planes)
        if out != release.planes:
            raise Unsupported(
                f"wan_vae: images of {out} channels, not {release.planes} (Qwen-Image-Layered's have transparency): "
                f"{_PLAIN}"
            )
        width = vote(self.name, "width", shapes, [(f"{norm}.gamma", 0), (f"{outer}.weight", 1)])
        ends = [(f"{encoder}.weight", 0), (f"{encoder}.bias", 0)]
        return WanVaeConfig(
            width=width,
            has_encoder=any(name.startswith("encoder.") for name in shapes),
            is_wan_2_2=is_wan_2_2,
            encoder_width=vote(self.name, "the encoder's width", shapes, ends, width) if is_wan_2_2 else 0,
        )

    def entries(self, config: WanVaeConfig, names: Collection[str]) -> Iterator[Entry]:
        is_original = _is_original(names)
        for layer in layers(config):
            source = layer.original if is_original else layer.name
            if layer.is_norm:
                yield tensor_entry(f"{source}.gamma", layer.shape, f"{layer.name}.gamma")
                continue
            yield tensor_entry(f"{source}.weight", layer.shape, f"{layer.name}.weight")
            yield tensor_entry(f"{source}.bias", layer.shape[:1], f"{layer.name}.bias")

    def heads(self, config: WanVaeConfig) -> int:
        return 0

    @property
    def operations(self) -> WanVaeOperations:
        from xditd.gpu_workers.families.wan_vae.operations import WanVaeOperations

        return WanVaeOperations()


def _is_original(names: Collection[str]) -> bool:
    return any(name.startswith(("decoder.middle.", "decoder.head.", "decoder.upsamples.")) for name in names)
