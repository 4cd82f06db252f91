"""What differs in FLUX.1's two variants: the rounding of timesteps, and the epsilon of query and key norms.

diffusers rounds a timestep to the weights' dtype before it multiplies by 1000, so that in bfloat16 several steps have
the same value. ComfyUI computes sines and cosines in float32. Both round guidance before they multiply. The norms'
epsilon is 1e-6 in diffusers; ComfyUI leaves it to torch, whose default is that of float32, 1.2e-7.

Source: diffusers, ``FluxTransformer2DModel.forward``, ``FluxAttention``; ComfyUI, ``BaseModel._apply_model``,
``timestep_embedding`` and ``QKNorm``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from xditd.gpu_workers.families.flux1.config import NORM_EPSILON
from xditd.gpu_workers.families.flux1.facts import FLOAT32_TIME
from xditd.gpu_workers.models.query_key_norms import FLOAT32_EPSILON

SCALE = 1000
"""The factor from a sigma in [0, 1] to the embedded value."""


def norm_epsilon(variant: str) -> float:
    """Return the epsilon of query and key norms."""
    return FLOAT32_EPSILON if variant == FLOAT32_TIME else NORM_EPSILON


def time_dtype(dtype: torch.dtype, variant: str) -> torch.dtype:
    """Return the dtype of timesteps, and of latents between steps, for weights of ``dtype``."""
    return torch.float32 if variant == FLOAT32_TIME else dtype


def scaled_time(timestep: torch.Tensor, dtype: torch.dtype, variant: str) -> torch.Tensor:
    """Scale sigmas, (rows,), to the values that are embedded, for weights of ``dtype``."""
    return timestep.to(time_dtype(dtype, variant)) * SCALE


def embed_time(
    embed: Callable[..., torch.Tensor],
    timestep: torch.Tensor,
    guidance: torch.Tensor | None,
    pooled: torch.Tensor,
    dtype: torch.dtype,
    variant: str,
) -> torch.Tensor:
    """Return the conditioning of each row, (rows, hidden); ``embed`` is diffusers' ``time_text_embed``."""
    scaled = scaled_time(timestep, dtype, variant)
    if guidance is None:
        return embed(scaled, pooled)
    return embed(scaled, guidance.to(dtype) * SCALE, pooled)
