"""Wan's class of diffusers with real tables of positions, and with ComfyUI's embedding of the time as a variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import (
    WanImageEmbedding,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
)

from xditd.gpu_workers.families.wan.config import (
    EPSILON,
    HEAD_SIZE,
    IMAGE_TOKENS,
    MOST_POSITIONS,
    PATCH,
    WanConfig,
)

_PERIOD = 10000


class _Positions(WanRotaryPosEmbed):
    """Tables of sines and cosines in float32, whatever the dtype of the weights, as diffusers keeps them."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        return self


class ComfyuisTime(Timesteps):
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


class _TwoImages(WanImageEmbedding):
    """The states of CLIP's vision model of a first and a last image, or, as in ComfyUI, of the first one alone."""

    images = 2

    def forward(self, encoder_hidden_states_image: torch.Tensor) -> torch.Tensor:
        if self.images == 2:
            return cast(torch.Tensor, super().forward(encoder_hidden_states_image))
        placed = encoder_hidden_states_image + self.pos_embed[:, :IMAGE_TOKENS]
        return cast(torch.Tensor, self.norm2(self.ff(self.norm1(placed))))


def sizes(config: WanConfig) -> dict[str, Any]:
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


def positions() -> WanRotaryPosEmbed:
    """Make tables of positions, which are no parameters, with their values."""
    with torch.device("cpu"):
        return _Positions(HEAD_SIZE, PATCH, MOST_POSITIONS)


def add_time(embedder: WanTimeTextImageEmbedding, config: WanConfig) -> ComfyuisTime:
    """Let ``embedder`` embed the time as diffusers or as ComfyUI does, by what is returned."""
    embedder.timesteps_proj = ComfyuisTime(config.time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedder.timesteps_proj


class WanModule(WanTransformer3DModel):
    """The class, built for a configuration, with real tables of positions. Its forward is that of :meth:`use`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(**sizes(config))
        self.rope = positions()
        self._time = add_time(self.condition_embedder, config)
        self._images: _TwoImages | None = None
        if config.has_image_positions:
            self._images = _TwoImages(config.image_channels, config.hidden, config.images * IMAGE_TOKENS)
            self.condition_embedder.image_embedder = self._images

    def use(self, *, is_comfyuis: bool, images: int) -> None:
        """Choose the forward: with diffusers' or with ComfyUI's embedding of the time, and the images of each row.

        Their number matters to a model of a first and a last image.
        """
        self._time.is_comfyuis = is_comfyuis
        if self._images is not None:
            self._images.images = images
