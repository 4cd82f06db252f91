"""The facts of a Wan transformer that clients get."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.families.wan.config import FRAMES, IMAGE_TOKENS, WanConfig
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

COMFYUI: Final = "comfyui"
"""ComfyUI's arithmetic: the frequencies of the time's embedding are powers, which differ in the last bits."""

PROMPT: Final = "prompt_embeds"
NEGATIVE: Final = "negative_prompt_embeds"

SHIFT: Final = "shift"
"""Of the schedule: 3 unless given, 5 of TI2V."""
EULER: Final = "euler"
"""Steps by ``FlowMatchEulerDiscreteScheduler``, not ``UniPCMultistepScheduler``."""
BOUNDARY: Final = "boundary_ratio"
"""The time, from 0 to 1, below which the second transformer predicts."""
SECOND_SCALE: Final = "guidance_scale_2"
"""The guidance scale of the second transformer; that of the first unless given."""


def transformer_facts(config: WanConfig, layout: ParallelLayout) -> TransformerFacts:
    """Return the arguments of ``Call`` and ``Generate``. Defaults are those of diffusers' ``WanPipeline``."""
    image = ArgumentFacts(
        name="encoder_hidden_states_image", shape=("rows", IMAGE_TOKENS, config.image_channels), is_needed=True
    )
    return TransformerFacts(
        heads=config.heads,
        ulysses=layout.degrees.ulysses,
        ring=layout.degrees.ring,
        arguments=(
            ArgumentFacts(
                name="hidden_states",
                shape=("rows", config.in_channels, "latent_frames", "latent_rows", "latent_columns"),
            ),
            ArgumentFacts(name="timestep", shape=("rows",)),
            ArgumentFacts(name="encoder_hidden_states", shape=("rows", "text_tokens", config.text_channels)),
            *((image,) if config.image_channels else ()),
        ),
        variants=("class", COMFYUI),
        conditioning=(
            ArgumentFacts(name=PROMPT, shape=("batch", "tokens", config.text_channels)),
            ArgumentFacts(name=NEGATIVE, shape=("batch", "negative_tokens", config.text_channels), is_needed=False),
        ),
        latents=LatentFacts(
            channels=config.out_channels,
            pixels=config.pixels,
            multiple=2,
            frames=FRAMES,
            scaling=LatentScaling(factor=1.0, shift=0.0),  # its VAE normalises each channel by its own statistics
        ),
        options=(SHIFT, EULER, BOUNDARY, SECOND_SCALE),
        stages=2,
        guidance="classifier_free",
        default_guidance_scale=5.0,
        default_steps=50,
    )
