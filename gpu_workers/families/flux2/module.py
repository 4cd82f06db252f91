"""FLUX.2's class of diffusers, with the last modulation in the files' order, and ComfyUI's arithmetic as a variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
    Flux2TimestepGuidanceEmbeddings,
)

from xditd.gpu_workers.families.flux2.config import (
    AXES,
    CHANNELS,
    EPSILON,
    HEAD_SIZE,
    MLP_RATIO,
    ROPE_THETA,
    TIMESTEP_CHANNELS,
    Flux2Config,
)
from xditd.gpu_workers.models.checkpoint_order import CheckpointOrderNorm
from xditd.gpu_workers.models.query_key_norms import FLOAT32_EPSILON, QueryKeyNorms

SCALE = 1000
"""The factor from a sigma in [0, 1] to the embedded value."""

CACHE = "cache"
"""An argument of the recipe's forwards: a :class:`ReferenceCache`, whose tokens come before those of the image."""


@dataclass(eq=False)
class ReferenceCache:
    """The keys and values of references in one generation, of the rows and tokens that this rank computes.

    The first forward that is given it fills it; later ones are given no references.
    """

    tokens: int
    kept: Flux2KVCache | None = None

    @property
    def is_filled(self) -> bool:
        return self.kept is not None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the class's forward for it."""
        if self.kept is not None:
            return {"kv_cache": self.kept, "kv_cache_mode": "cached"}
        return {"kv_cache_mode": "extract", "num_ref_tokens": self.tokens}


class _TimeEmbeddings(Flux2TimestepGuidanceEmbeddings):
    exact: torch.Tensor | None = None
    """The embedded value in float32, in place of the rounded one, while a forward of that variant runs."""

    def forward(self, timestep: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
        if self.exact is None:
            return super().forward(timestep, guidance)
        exact, self.exact = self.exact, None  # a second call of the forward is that of the references, at 0
        embedded: torch.Tensor = self.timestep_embedder(self.time_proj(exact).to(timestep.dtype))
        if guidance is not None and self.guidance_embedder is not None:
            embedded = embedded + self.guidance_embedder(self.time_proj(guidance).to(guidance.dtype))
        return embedded


class Flux2Module(Flux2Transformer2DModel):
    """The class, built for a configuration. Its forward is that of :meth:`use`."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__(
            in_channels=CHANNELS,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_channels,
            timestep_guidance_channels=TIMESTEP_CHANNELS,
            mlp_ratio=float(MLP_RATIO),
            axes_dims_rope=AXES,
            rope_theta=ROPE_THETA,
            eps=EPSILON,
            guidance_embeds=config.has_guidance,
        )
        width = config.hidden
        self.time_guidance_embed = _TimeEmbeddings(
            in_channels=TIMESTEP_CHANNELS, embedding_dim=width, bias=False, guidance_embeds=config.has_guidance
        )
        if config.is_original:
            self.norm_out = CheckpointOrderNorm(width, width, elementwise_affine=False, eps=EPSILON, bias=False)
        self._has_float32_time = False
        self._norms = QueryKeyNorms(self)
        if not config.has_guidance:  # klein's, which compute as the others do in forwards without a cache
            for block in self.transformer_blocks:
                block.attn.set_processor(Flux2KVAttnProcessor())
            for block in self.single_transformer_blocks:
                block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())

    def use(self, *, is_comfyuis: bool) -> None:
        """Choose the forward: the class's, or with ComfyUI's embedding of the time and its query and key norms."""
        self._has_float32_time = is_comfyuis
        self._norms.use(FLOAT32_EPSILON if is_comfyuis else None)

    def forward(self, *args: Any, timestep: torch.Tensor, **kwargs: Any) -> Any:
        if not self._has_float32_time:
            return super().forward(*args, timestep=timestep, **kwargs)
        self.time_guidance_embed.exact = timestep.float() * SCALE
        try:
            return super().forward(*args, timestep=timestep, **kwargs)
        finally:
            self.time_guidance_embed.__dict__.pop("exact", None)
