"""The facts of a Z-Image transformer that clients get."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.families.z_image.config import LATENT_CHANNELS, PATCH, PIXELS_PER_LATENT, ZImageConfig
from xditd.gpu_workers.families.z_image.prompt import FACTS
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

SHIFT: Final = "shift"
CFG_NORMALIZATION: Final = "cfg_normalization"
CFG_TRUNCATION: Final = "cfg_truncation"

COMFYUI: Final = "comfyui"
"""The variant with ComfyUI's arithmetic: time is 1 - sigma (in diffusers (1000 - 1000 sigma) / 1000), and the epsilon
of query and key norms is that of float32 (in diffusers 1e-5)."""


def transformer_facts(config: ZImageConfig, layout: ParallelLayout) -> TransformerFacts:
    """Return the arguments of ``Call`` and ``Generate``. Defaults are Turbo's, which cannot be told from Base."""
    return TransformerFacts(
        heads=config.heads,
        ulysses=layout.degrees.ulysses,
        ring=layout.degrees.ring,
        arguments=(
            ArgumentFacts(name="x", shape=(LATENT_CHANNELS, 1, "height", "width"), is_list=True),
            ArgumentFacts(name="t", shape=("batch",)),
            ArgumentFacts(name="cap_feats", shape=("tokens", config.text_channels), is_list=True),
        ),
        variants=("class", COMFYUI),
        conditioning=(
            ArgumentFacts(name="prompt_embeds", shape=("tokens", config.text_channels), is_list=True),
            ArgumentFacts(
                name="negative_prompt_embeds", shape=("tokens", config.text_channels), is_list=True, is_needed=False
            ),
        ),
        options=(SHIFT, CFG_NORMALIZATION, CFG_TRUNCATION),
        latents=LatentFacts(
            channels=LATENT_CHANNELS,
            pixels=PIXELS_PER_LATENT,
            multiple=PATCH,
            scaling=LatentScaling(factor=0.3611, shift=0.1159),  # its VAE is FLUX.1's
            space="flux1",
        ),
        guidance="classifier_free",
        default_guidance_scale=0.0,
        default_steps=8,
        starts=("image", "mask"),
        prompt=FACTS,
    )
