"""The sizes of a FLUX.1 transformer, and the constants of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEAD_SIZE = 128
HIDDEN = 3072
"""Of the released models; other sizes run, too."""
MLP_RATIO = 4
MODULATIONS_DOUBLE = 6
MODULATIONS_SINGLE = 3
LATENT_CHANNELS = 16
PATCH = 2
PIXELS_PER_LATENT = 8
"""Pixels per latent on each side, by its VAE."""
PACKED_CHANNELS = LATENT_CHANNELS * PATCH * PATCH
TIMESTEP_CHANNELS = 256
NORM_EPSILON = 1e-6
"""Of query and key norms of diffusers' classes."""
CONTROL_CHANNELS = 2 * PACKED_CHANNELS
"""Inputs of Canny and Depth: latents, and those of the control image."""
FILL_CHANNELS = 2 * PACKED_CHANNELS + (PATCH * PIXELS_PER_LATENT) ** 2
"""Inputs of Fill: latents, those of the masked image, and the mask's pixels."""

DEV_SCHEDULER: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHNELL_SCHEDULER: Mapping[str, object] = {**DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}


@dataclass(frozen=True, slots=True)
class Flux1Sizes:
    """What a FLUX.1 transformer and a ControlNet for it both have."""

    hidden: int
    double_blocks: int
    single_blocks: int
    context_channels: int
    pooled_channels: int
    has_guidance: bool

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE

    @property
    def class_arguments(self) -> dict[str, Any]:
        """Arguments of diffusers' classes."""
        return {
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": HEAD_SIZE,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.context_channels,
            "pooled_projection_dim": self.pooled_channels,
            "guidance_embeds": self.has_guidance,
        }


@dataclass(frozen=True, slots=True)
class Flux1Config(Flux1Sizes):
    """The sizes of a FLUX.1 transformer.

    A timestep is a sigma in [0, 1]; the model multiplies it by 1000. Guidance is the distilled guidance scale (usually
    3.5), an input of the model, not classifier-free guidance.
    """

    is_original: bool = True
    """The names are those of the original and of ComfyUI's files, not diffusers': a norm gives shift before scale."""
    in_channels: int = PACKED_CHANNELS
    """Of a token: those of the latents, and for Fill, Canny and Depth those of what the image is made from."""

    @property
    def scheduler(self) -> Mapping[str, object]:
        """Keyword arguments of diffusers' ``FlowMatchEulerDiscreteScheduler``."""
        return DEV_SCHEDULER if self.has_guidance else SCHNELL_SCHEDULER
