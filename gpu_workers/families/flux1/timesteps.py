"""A timestep on its way into a FLUX.1 transformer: what is rounded to the weights' dtype, and when.

diffusers rounds it before it is multiplied by 1000, so that in bfloat16 many steps of a schedule share a few values.
ComfyUI keeps it in float32 until its sines and cosines are known. Guidance is rounded first in both.

Source: diffusers, ``FluxTransformer2DModel.forward``; ComfyUI, ``BaseModel._apply_model`` and ``timestep_embedding``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from xditd.gpu_workers.families.flux1.facts import FLOAT32_TIME

SCALE = 1000
"""From a sigma in [0, 1] to what is embedded."""


def time_dtype(dtype: torch.dtype, variant: str) -> torch.dtype:
    """Return the dtype in which a model with weights of ``dtype`` takes timesteps, and latents between steps."""
    return torch.float32 if variant == FLOAT32_TIME else dtype


def scaled_time(timestep: torch.Tensor, dtype: torch.dtype, variant: str) -> torch.Tensor:
    """Return what is embedded of sigmas, (rows,), for a model with weights of ``dtype``."""
    return timestep.to(time_dtype(dtype, variant)) * SCALE


def embed_time(
    embed: Callable[..., torch.Tensor],
    timestep: torch.Tensor,
    guidance: torch.Tensor | None,
    pooled: torch.Tensor,
    dtype: torch.dtype,
    variant: str,
) -> torch.Tensor:
    """Return what modulates the blocks for each row, (rows, hidden); ``embed`` is diffusers' ``time_text_embed``."""
    scaled = scaled_time(timestep, dtype, variant)
    if guidance is None:
        return embed(scaled, pooled)
    return embed(scaled, guidance.to(dtype) * SCALE, pooled)
