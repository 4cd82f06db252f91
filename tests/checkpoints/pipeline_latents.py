"""The latents of a call of a tiny pipeline of diffusers, in the shape of ours."""

from __future__ import annotations

from typing import Any

import torch
from pipeline_folders import HEIGHT, WIDTH

SEED = 1
SIZE = {"height": HEIGHT, "width": WIDTH}


def latents(pipeline: Any, family: str, **given: Any) -> torch.Tensor:
    """Return the latents of a pipeline's call, in the shape of ours."""
    from diffusers import FluxPipeline, QwenImagePipeline

    last: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: int, ___: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last.update(given)
        return {}

    generator = torch.Generator("cpu").manual_seed(SEED)
    found = pipeline(
        generator=generator, output_type="latent", callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"], **SIZE, **given,
    )  # fmt: skip
    result = found.frames if hasattr(found, "frames") else last["latents"]
    if family == "flux1":
        return FluxPipeline._unpack_latents(result, HEIGHT, WIDTH, 8)
    if family == "qwen_image":
        return QwenImagePipeline._unpack_latents(result, HEIGHT, WIDTH, 8).squeeze(2)
    if family == "flux2" and result.ndim == 3:
        return result.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
    return result
