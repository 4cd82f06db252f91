"""For tests: jobs of FLUX.1 with LoRAs through a client, and what plain diffusers makes of the same weights."""

from __future__ import annotations

from typing import Any

import torch
from lora_files import Lora

from xditd.client import Client
from xditd.gpu_workers.families.flux1 import reference

STEPS = 2


def latents_of(client: Client, component: Any, inputs: Any, **more: Any) -> torch.Tensor:
    given = {"height": inputs.pixels, "width": inputs.pixels, "steps": STEPS, "noise": inputs.noise} | more
    return client.generate(component, inputs.conditioning, **given).result().latents


def expected(module: Any, inputs: Any) -> torch.Tensor:
    return reference.reference_latents(
        module,
        prompt_embeds=inputs.prompt_embeds,
        pooled_prompt_embeds=inputs.pooled_prompt_embeds,
        noise=inputs.noise,
        height=inputs.pixels,
        width=inputs.pixels,
        steps=STEPS,
    )


def baked(state: dict[str, torch.Tensor], *loras: tuple[Lora, float]) -> Any:
    """Diffusers' own class with LoRAs in its weights."""
    for lora, strength in loras:
        if not lora.is_of_class:
            state = lora.baked_into(state, strength)
    module = reference.transformer_from({name: tensor.clone() for name, tensor in state.items()})
    for lora, strength in loras:
        if lora.is_of_class:
            lora.bake_into(module, strength)
    return module


def called(client: Client, component: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One small forward of FLUX.1, at a time and a guidance that bfloat16 does not round."""
    return client.call(
        component,
        {
            "hidden_states": torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype),
            "encoder_hidden_states": torch.ones(1, 6, 4096, dtype=dtype),
            "pooled_projections": torch.ones(1, 768, dtype=dtype),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([4.0]),
            "img_ids": reference_ids(4),
            "txt_ids": torch.zeros(6, 3),
        },
    )[0]


def reference_ids(side: int) -> torch.Tensor:
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None]
    return ids.reshape(side * side, 3)
