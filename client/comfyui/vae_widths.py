"""The widths of an image VAE in the names of ldm, for ComfyUI's class of it.

ComfyUI takes the encoder's widths to be 128, 256, 512 and 512, and the decoder's to have these ratios. Its class has
arguments for others.

Source: ComfyUI 0.33, ``comfy/sd.py`` (``VAE``), ``comfy/ldm/modules/diffusionmodules/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

_LEVELS: Final = 4
_RATIOS: Final = [1, 2, 4, 4]
_FIRST: Final = 128
_BLOCKS: Final = 2
_ENCODER, _DECODER = "encoder.down", "decoder.up"
_OF_OTHER_KINDS: Final = (f"{_DECODER}.{_LEVELS}.block.0.conv1.weight", "bn.running_mean")
"""More levels, or a norm of latents."""


def other_widths(shapes: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """Return the arguments of ComfyUI's ``AutoencoderKL`` for a file whose widths ComfyUI takes to be others.

    ``None``: ComfyUI reads these widths itself, or the file is of another kind.
    """
    decoder = _sizes(shapes, _DECODER)
    if decoder is None or any(name in shapes for name in _OF_OTHER_KINDS):
        return None
    decoder["num_res_blocks"] -= 1  # a decoder has one more at each level
    encoder = _sizes(shapes, _ENCODER) or decoder
    stock = {"ch_mult": _RATIOS, "num_res_blocks": _BLOCKS}
    has_encoder = encoder is not decoder
    if decoder == {**stock, "ch": decoder["ch"]} and (not has_encoder or encoder == {**stock, "ch": _FIRST}):
        return None
    channels = int(shapes["decoder.conv_in.weight"].shape[1])
    same = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"embed_dim": channels, "ddconfig": {**same, **encoder}, "decoder_ddconfig": {**same, **decoder}}


def quant_convs(widths: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Make the convolutions beside the latents, which ComfyUI's class has even if the file has none."""
    import torch

    channels = widths["embed_dim"]
    sizes = {"quant_conv": 2 * channels, "post_quant_conv": channels}
    weights = {f"{name}.weight": torch.empty(size, size, 1, 1) for name, size in sizes.items()}
    return weights | {f"{name}.bias": torch.empty(size) for name, size in sizes.items()}


def _sizes(shapes: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any] | None:
    """Return what one half's tensors say of its widths; ``None`` if it has other names, or no ratios of widths."""
    names = [f"{prefix}.{level}.block.0.conv1.weight" for level in range(_LEVELS)]
    if any(name not in shapes or shapes[name].ndim != 4 for name in names):
        return None
    widths = [int(shapes[name].shape[0]) for name in names]
    if any(width % widths[0] for width in widths):
        return None
    blocks = next(number for number in count() if f"{prefix}.0.block.{number}.conv1.weight" not in shapes)
    return {"ch": widths[0], "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": blocks}
