"""Tiny seeded pipelines of diffusers, in memory and as the folders that they save, and what stands for their prompts.

Their transformers and VAEs are those of the families' other tests; schedulers have settings that are not the families'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flux1_variants
import flux2_models
import flux2_vaes
import qwen_image_models
import torch
import wan_models
import wan_vaes
import z_image_models

from xditd.client.demo.checkpoints import flux_vae_state_dict

Conditioning = dict[str, Any]
HEIGHT, WIDTH = 64, 96


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux_euler(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    settings = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.6, "max_shift": 1.3}
    return FlowMatchEulerDiscreteScheduler(**{**settings, **changes})


def flux_vae() -> Any:
    from xditd.gpu_workers.families.flux1 import reference

    return reference.vae_from(flux_vae_state_dict(1))


def flux1_transformer(channels: int = 64) -> Any:
    from xditd.gpu_workers.families.flux1 import reference

    return reference.transformer_from(flux1_variants.state_of(channels))


def flux1(kind: str = "FluxPipeline", channels: int = 64, **changes: Any) -> Any:
    import diffusers

    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    given = {"vae": flux_vae(), "transformer": flux1_transformer(channels), **dict.fromkeys(names), **changes}
    return getattr(diffusers, kind)(scheduler=flux_euler(), **given)


def flux1_texts(batch: int = 1) -> Conditioning:
    return {"prompt_embeds": rows(1, batch, 15, 4096), "pooled_prompt_embeds": rows(2, batch, 768)}


def flux2(kind: str = "Flux2Pipeline", **settings: Any) -> Any:
    import diffusers

    config = flux2_models.DEV if kind == "Flux2Pipeline" else flux2_models.KLEIN
    transformer = flux2_models.reference(flux2_models.state_dict(0, config), config)
    return getattr(diffusers, kind)(
        scheduler=flux_euler(), vae=flux2_vaes.reference(), text_encoder=None, tokenizer=None, transformer=transformer,
        **settings,
    )  # fmt: skip


def flux2_texts(batch: int = 1, negative: bool = False) -> Conditioning:
    found = {"prompt_embeds": rows(1, batch, 9, 96)}
    return found | ({"negative_prompt_embeds": rows(2, batch, 9, 96)} if negative else {})


def qwen_vae() -> Any:
    return wan_vaes.reference(wan_vaes.state_dict(), class_name="AutoencoderKLQwenImage")


def qwen_image(kind: str = "QwenImagePipeline") -> Any:
    import diffusers

    more = {"processor": None} if "Edit" in kind else {}
    return getattr(diffusers, kind)(
        scheduler=qwen_image_models.scheduler(max_shift=0.8), vae=qwen_vae(), text_encoder=None, tokenizer=None,
        transformer=qwen_image_models.reference(qwen_image_models.state_dict(0)), **more,
    )  # fmt: skip


def qwen_image_texts(batch: int = 1, negative: bool = False) -> Conditioning:
    found = {"prompt_embeds": rows(1, batch, 9, 96)}
    return found | ({"negative_prompt_embeds": rows(2, batch, 6, 96)} if negative else {})


def z_image(kind: str = "ZImagePipeline") -> Any:
    import diffusers

    transformer = z_image_models.reference(z_image_models.state_dict(0))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    return getattr(diffusers, kind)(
        scheduler=scheduler, vae=flux_vae(), text_encoder=None, tokenizer=None, transformer=transformer
    )


def z_image_texts(batch: int = 1, negative: bool = False) -> Conditioning:
    found = {"prompt_embeds": [rows(number, 7 + number, 64) for number in range(batch)]}
    more = {"negative_prompt_embeds": [rows(10 + number, 5, 64) for number in range(batch)]}
    return found | (more if negative else {})


def wan_vae(config: Any) -> Any:
    vae = wan_vaes.reference(wan_vaes.state_dict(config=config), config)
    vae.register_to_config(latents_mean=list(config.release.means), latents_std=list(config.release.deviations))
    return vae


def wan(kind: str = "WanPipeline", config: Any = wan_models.TEXT, **changes: Any) -> Any:
    import diffusers

    release = wan_vaes.SMALL_2_2 if config is wan_models.TI2V else wan_vaes.SMALL
    given = {
        "tokenizer": None,
        "text_encoder": None,
        "transformer": wan_models.reference(wan_models.state_dict(0, config), config),
        "vae": wan_vae(release),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0, solver_order=3
        ),
    }
    return getattr(diffusers, kind)(**{**given, **changes})


def wan_texts(batch: int = 1, negative: bool = True, tokens: int = 12) -> Conditioning:
    shape = (batch, tokens, wan_models.TEXT.text_channels)
    return {"prompt_embeds": rows(1, *shape)} | ({"negative_prompt_embeds": rows(2, *shape)} if negative else {})


def saved(pipeline: Any, folder: Path) -> Path:
    """Save a pipeline's folder, and return it. Its progress bars are switched off."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return folder


FAMILIES: Mapping[str, tuple[Callable[..., Any], Callable[..., Conditioning]]] = {
    "flux1": (flux1, flux1_texts),
    "flux2": (flux2, flux2_texts),
    "qwen_image": (qwen_image, qwen_image_texts),
    "z_image": (z_image, z_image_texts),
    "wan": (wan, wan_texts),
}
