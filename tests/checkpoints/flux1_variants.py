"""For tests, and programs beside them: seeded checkpoints of FLUX.1's variants, and what their images are made from."""

from __future__ import annotations

from typing import Any

import torch

from xditd.client.demo.checkpoints import flux1_state_dict

State = dict[str, torch.Tensor]

HEIGHT, WIDTH = 64, 96


def state_of(channels: int, dtype: torch.dtype = torch.float32) -> State:
    state = flux1_state_dict(1, dtype=dtype)
    hidden = state["img_in.weight"].shape[0]
    generator = torch.Generator().manual_seed(channels)
    state["img_in.weight"] = (torch.randn(hidden, channels, generator=generator) / channels**0.5).to(dtype)
    return state


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int) -> State:
    return {"prompt_embeds": numbers(1, batch, 15, 4096), "pooled_prompt_embeds": numbers(2, batch, 768)}


def pictures(channels: int, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    """Return what an image is made from besides its text, for a model of so many input channels."""
    latents = numbers(8, 1, 16, height // 8, width // 8)
    if channels == 64:
        return {"reference_latents": [latents[0, :, :6, :10]]}
    if channels == 128:
        return {"control_latents": latents}
    return {"masked_image_latents": latents, "mask": torch.ones(1, 1, height, width)}
