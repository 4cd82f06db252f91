"""Wan's classes of diffusers with real tables of positions, and with ComfyUI's embedding of the time as a variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from xditd.gpu_workers.families.wan.config import (
    CONTROL_CHANNELS,
    EPSILON,
    HEAD_SIZE,
    IMAGE_TOKENS,
    MOST_POSITIONS,
    PATCH,
    WanConfig,
    WanVaceConfig,
)

_PERIOD = 10000


class _Positions(WanRotaryPosEmbed):
    """Tables of sines and cosines in float32, whatever the dtype of the weights, as diffusers keeps them."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        return self


class _Time(Timesteps):
    """Sines and cosines of timesteps; with ``is_comfyuis`` of the frequencies that ComfyUI computes.

    Both compute in float32, one by an exponential, the other by a power. They differ in the last bits, which a time of
    up to 1000 multiplies.
    """

    is_comfyuis = False

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        if not self.is_comfyuis:
            return cast(torch.Tensor, super().forward(timesteps))
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = torch.outer(timesteps.float(), torch.pow(_PERIOD, -exponents))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def _sizes(config: WanConfig) -> dict[str, Any]:
    """Return the arguments of the classes."""
    return {
        "patch_size": PATCH,
        "num_attention_heads": config.heads,
        "attention_head_dim": HEAD_SIZE,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_channels,
        "freq_dim": config.time_channels,
        "ffn_dim": config.ffn,
        "num_layers": config.blocks,
        "eps": EPSILON,
        "image_dim": config.image_channels or None,
        "added_kv_proj_dim": config.hidden if config.image_channels else None,
        "pos_embed_seq_len": config.images * IMAGE_TOKENS if config.has_image_positions else None,
    }


def _positions() -> _Positions:
    with torch.device("cpu"):  # tables of positions are no parameters
        return _Positions(HEAD_SIZE, PATCH, MOST_POSITIONS)


class WanModule(WanTransformer3DModel):
    """The class, built for a configuration, with real tables of positions. Its forward is that of :meth:`use`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(**_sizes(config))
        self.rope = _positions()
        self._time = self.condition_embedder.timesteps_proj = _Time(
            config.time_channels, flip_sin_to_cos=True, downscale_freq_shift=0
        )

    def use(self, *, is_comfyuis: bool) -> None:
        """Choose the forward: with diffusers' or with ComfyUI's embedding of the time."""
        self._time.is_comfyuis = is_comfyuis


class WanVaceModule(WanVACETransformer3DModel):
    """The class of VACE, built for a configuration, with real tables of positions."""

    def __init__(self, config: WanVaceConfig) -> None:
        layers = {"vace_layers": list(config.control_layers), "vace_in_channels": CONTROL_CHANNELS}
        super().__init__(**_sizes(config), **layers)
        self.rope = _positions()
