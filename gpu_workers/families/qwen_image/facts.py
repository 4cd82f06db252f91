"""The facts of a Qwen-Image transformer that clients get."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.families.qwen_image.config import (
    LATENT_CHANNELS,
    PACKED_CHANNELS,
    PATCH,
    PIXELS_PER_LATENT,
    QwenImageConfig,
)
from xditd.gpu_workers.families.qwen_image.prompt import FACTS
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

ZERO_COND_T: Final = "zero_cond_t"
"""The class with ``zero_cond_t``, as Edit-2511 has it, for weights whose file does not show it."""

COMFYUI: Final = "comfyui"
"""ComfyUI's arithmetic: time is not rounded to the weights' dtype before it is embedded, the middle of an odd number of
rows is position 0, and a text begins behind the first image however large the references."""

SHIFT: Final = "shift"

PROMPT: Final = "prompt_embeds"
PROMPT_MASK: Final = "prompt_embeds_mask"
NEGATIVE: Final = "negative_prompt_embeds"
NEGATIVE_MASK: Final = "negative_prompt_embeds_mask"
REFERENCES: Final = "reference_latents"

LATENTS: Final = LatentFacts(
    channels=LATENT_CHANNELS,
    pixels=PIXELS_PER_LATENT,
    multiple=PATCH,
    scaling=LatentScaling(factor=1.0, shift=0.0),  # its VAE has a mean and a deviation for each channel
    space="wan_2_1",
)


def transformer_facts(config: QwenImageConfig, layout: ParallelLayout) -> TransformerFacts:
    """Return the arguments of ``Call`` and ``Generate``. Defaults are those of the pipelines."""
    channels = config.text_channels
    return TransformerFacts(
        heads=config.heads,
        ulysses=layout.degrees.ulysses,
        ring=layout.degrees.ring,
        arguments=(
            ArgumentFacts(name="hidden_states", shape=("rows", "image_tokens", PACKED_CHANNELS)),
            ArgumentFacts(name="encoder_hidden_states", shape=("rows", "text_tokens", channels)),
            ArgumentFacts(name="encoder_hidden_states_mask", shape=("rows", "text_tokens"), is_needed=False),
            ArgumentFacts(name="timestep", shape=("rows",)),
            # Of each row a list of images, the one to make and then its references: frames, rows, columns of tokens.
            ArgumentFacts(name="img_shapes", shape=("images", 3), is_list=True),
        ),
        variants=("class", ZERO_COND_T, COMFYUI),
        conditioning=(
            ArgumentFacts(name=PROMPT, shape=("batch", "tokens", channels)),
            ArgumentFacts(name=PROMPT_MASK, shape=("batch", "tokens"), is_needed=False),
            ArgumentFacts(name=NEGATIVE, shape=("batch", "negative_tokens", channels), is_needed=False),
            ArgumentFacts(name=NEGATIVE_MASK, shape=("batch", "negative_tokens"), is_needed=False),
            ArgumentFacts(
                name=REFERENCES,
                shape=(LATENT_CHANNELS, "reference_height", "reference_width"),
                is_list=True,
                is_shared=True,
                is_needed=False,
            ),
        ),
        options=(SHIFT,),
        latents=LATENTS,
        guidance="classifier_free",
        default_guidance_scale=4.0,
        default_steps=50,
        starts=("image", "mask"),
        prompt=FACTS,
    )
