"""The rounding of FLUX.1's timesteps to the weights' dtype, in two variants.

diffusers rounds a timestep before it multiplies by 1000, so that in bfloat16 several steps have the same value. ComfyUI
computes sines and cosines in float32. Both round guidance before they multiply.

Source: diffusers, ``FluxTransformer2DModel.forward``; ComfyUI, ``BaseModel._apply_model`` and ``timestep_embedding``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from xditd.gpu_workers.families.flux1.facts import FLOAT32_TIME

SCALE = 1000
"""The factor from a sigma in [0, 1] to the embedded value."""


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
