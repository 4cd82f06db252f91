"""For tests and their programs: seeded VAEs of Wan 2.1 and Wan 2.2 in two namings, and plain diffusers on them."""

from __future__ import annotations

import re
from typing import Any, Final

import torch

from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.families.wan_vae.config import WAN_2_1, WAN_2_2, WanVaeConfig

State = dict[str, torch.Tensor]
SMALL: Final = WanVaeConfig(width=8)
SMALL_2_2: Final = WanVaeConfig(width=16, is_wan_2_2=True, encoder_width=8)
CONFIGS: Final = {"wan 2.1": SMALL, "wan 2.2": SMALL_2_2}
NAMINGS: Final = {"original": ("decoder.middle.0.residual.0.gamma",), "diffusers": ()}
TI2V: Final[dict[str, Any]] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
"""Of the ``config.json`` beside the VAE of Wan 2.2 TI2V 5B, what differs from the class's defaults."""

_PARTS: Final = {
    ".residual.0.": ".norm1.",
    ".residual.2.": ".conv1.",
    ".residual.3.": ".norm2.",
    ".residual.6.": ".conv2.",
    ".shortcut.": ".conv_shortcut.",
}
_WHOLE: Final = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."),
    (r"coder\.head\.2\.", "coder.conv_out."),
    (r"coder\.middle\.1\.", "coder.mid_block.attentions.0."),
    (r"coder\.middle\.0\.", "coder.mid_block.resnets.0."),
    (r"coder\.middle\.2\.", "coder.mid_block.resnets.1."),
    (r"^encoder\.downsamples\.(\d)\.downsamples\.2\.", r"encoder.down_blocks.\1.downsampler."),
    (r"^encoder\.downsamples\.(\d)\.downsamples\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^decoder\.upsamples\.(\d)\.upsamples\.3\.", r"decoder.up_blocks.\1.upsampler."),
    (r"^decoder\.upsamples\.(\d)\.upsamples\.(\d)\.", r"decoder.up_blocks.\1.resnets.\2."),
)


def state_dict(naming: str = "original", config: WanVaeConfig = SMALL) -> State:
    """Make a checkpoint; every tensor matters, and images have values of order 1."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for entry in WanVae().entries(config, NAMINGS[naming]):
        values = torch.randn(entry.shape, generator=generator)
        if not entry.source.endswith(".weight"):
            values = 1.0 + 0.1 * values if entry.source.endswith("gamma") else 0.1 * values
        else:
            values = values / torch.Size(entry.shape[1:]).numel() ** 0.5
        state[entry.source] = values
    return state


def to_diffusers(state: State) -> State:
    """Return the tensors by diffusers' names: by its own conversion, or for Wan 2.2, for which it has none, by ours."""
    if not any(name.startswith(("decoder.middle.", "decoder.head.")) for name in state):
        return dict(state)
    if not any(".upsamples.0.upsamples." in name for name in state):
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        converted: State = convert_wan_vae_to_diffusers(dict(state))
        return converted
    return {_renamed(name): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    for pattern, new in _WHOLE:
        name = re.sub(pattern, new, name)
    for old, part in _PARTS.items():
        name = name.replace(old, part)
    return name


def reference(state: State, config: WanVaeConfig = SMALL, *, class_name: str = "AutoencoderKLWan") -> Any:
    """Return the class of diffusers with these tensors."""
    import diffusers

    sizes: dict[str, Any] = {"base_dim": config.encoder_width or config.width}
    if config.is_wan_2_2:
        sizes = TI2V | sizes | {"decoder_base_dim": config.width}
    module = getattr(diffusers, class_name)(**sizes)
    module.load_state_dict(to_diffusers(state))
    return module.eval().requires_grad_(False)


def statistics(config: WanVaeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and deviations of the channels, (1, channels, 1, 1, 1) each."""
    release = WAN_2_2 if config.is_wan_2_2 else WAN_2_1
    means, deviations = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (release.means, release.deviations))
    return means, deviations


def reference_decode(module: Any, config: WanVaeConfig, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents of videos as the pipelines do; clamped to [-1, 1]."""
    means, deviations = (each.to(latents.device, latents.dtype) for each in statistics(config))
    with torch.no_grad():
        video: torch.Tensor = module.decode(latents / (1.0 / deviations) + means, return_dict=False)[0]
    return video


def reference_encode(module: Any, config: WanVaeConfig, video: torch.Tensor, *, is_image: bool = False) -> torch.Tensor:
    """Encode videos to the latents of Wan's pipelines, or images of one frame to those of Qwen-Image's."""
    with torch.no_grad():
        mode: torch.Tensor = module.encode(video).latent_dist.mode()
    if not is_image:
        mode = mode.to(torch.promote_types(mode.dtype, torch.float32))
    means, deviations = (each.to(mode.device, mode.dtype) for each in statistics(config))
    return (mode - means) / deviations if is_image else (mode - means) * (1.0 / deviations)
