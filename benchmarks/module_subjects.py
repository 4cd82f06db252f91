"""Transformers of diffusers at full size, each with the arguments of one forward, for the part ``modules``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = dict[str, Any]
MODELS = ("flux1", "qwen_image", "z_image", "wan", "flux2")
SIZES = ("standard", "large")
"""1024 x 1024 and 2048 x 2048 pixels; of Wan 81 frames of 832 x 480 and 1280 x 720."""


class Subjects:
    """The models: for each a class with its configuration, and the arguments of one forward."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, small: bool, size: str = "standard") -> None:
        self.device, self.dtype, self.small, self.is_large = device, dtype, small, size == "large"
        self.grid = (4 if small else 64) * (1 + self.is_large)  # tokens on a side of an image of 1024 or 2048 pixels

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def times(self, value: float) -> torch.Tensor:
        return torch.tensor([value], device=self.device, dtype=self.dtype)

    def ids(self, axes: int) -> torch.Tensor:
        """Positions of the image's tokens, (tokens, axes): zeros, row, column, zeros."""
        tokens = torch.arange(self.grid**2, device=self.device)
        found = torch.zeros(len(tokens), axes, device=self.device)
        found[:, 1], found[:, 2] = tokens // self.grid, tokens % self.grid
        return found

    def flux1(self) -> tuple[str, Arguments, Callable[[], Arguments]]:
        config: Arguments = {"guidance_embeds": True}
        if self.small:
            config |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}
        text = config.get("joint_attention_dim", 4096)
        tokens = 16 if self.small else 512
        return (
            "FluxTransformer2DModel",
            config,
            lambda: {
                "hidden_states": self.random(1, self.grid**2, 64),
                "encoder_hidden_states": self.random(1, tokens, text),
                "pooled_projections": self.random(1, 768),
                "timestep": self.times(0.5),
                "img_ids": self.ids(3),
                "txt_ids": torch.zeros(tokens, 3, device=self.device),
                "guidance": self.times(3.5),
            },
        )

    def qwen_image(self) -> tuple[str, Arguments, Callable[[], Arguments]]:
        config = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64} if self.small else {}
        return (
            "QwenImageTransformer2DModel",
            config,
            lambda: {
                "hidden_states": self.random(1, self.grid**2, 64),
                "encoder_hidden_states": self.random(1, 256, config.get("joint_attention_dim", 3584)),
                "timestep": self.times(0.5),
                "img_shapes": [[(1, self.grid, self.grid)]],
            },
        )

    def flux2(self) -> tuple[str, Arguments, Callable[[], Arguments]]:
        config: Arguments = {}
        if self.small:
            config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}
        tokens = 16 if self.small else 512
        return (
            "Flux2Transformer2DModel",
            config,
            lambda: {
                "hidden_states": self.random(1, self.grid**2, 128),
                "encoder_hidden_states": self.random(1, tokens, config.get("joint_attention_dim", 15360)),
                "timestep": self.times(0.5),
                "img_ids": self.ids(4)[None],
                "txt_ids": torch.zeros(1, tokens, 4, device=self.device),
                "guidance": self.times(3.5),
            },
        )

    def z_image(self) -> tuple[str, Arguments, Callable[[], Arguments]]:
        config = {"dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64} if self.small else {}
        return (
            "ZImageTransformer2DModel",
            config,
            lambda: {
                "x": [self.random(16, 1, 2 * self.grid, 2 * self.grid)],
                "t": self.times(0.5),
                "cap_feats": [self.random(32 if self.small else 256, config.get("cap_feat_dim", 2560))],
            },
        )

    def wan(self) -> tuple[str, Arguments, Callable[[], Arguments]]:
        config = {"num_layers": 2, "num_attention_heads": 2, "text_dim": 64, "ffn_dim": 256} if self.small else {}
        frames, height, width = (21, 90, 160) if self.is_large else (21, 60, 104)
        if self.small:
            frames, height, width = (3, 8, 16 if self.is_large else 8)
        return (
            "WanTransformer3DModel",
            config,
            lambda: {
                "hidden_states": self.random(1, 16, frames, height, width),
                "timestep": torch.tensor([500], device=self.device),
                "encoder_hidden_states": self.random(1, 16 if self.small else 512, config.get("text_dim", 4096)),
            },
        )
