"""The facts of a FLUX.1 transformer that clients get."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.families.flux1.config import (
    CONTROL_CHANNELS,
    FILL_CHANNELS,
    LATENT_CHANNELS,
    PACKED_CHANNELS,
    PATCH,
    PIXELS_PER_LATENT,
    Flux1Config,
)
from xditd.gpu_workers.families.flux1.prompt import FACTS
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

FLOAT32_TIME: Final = "float32_time"
"""ComfyUI's variant: see :mod:`~xditd.gpu_workers.families.flux1.timesteps`."""

VARIANTS: Final = ("class", FLOAT32_TIME)
WARM_UP_SIZES: Final = {"rows": 1, "text_tokens": 512, "image_tokens": 4096}
"""Those of an image of 1024x1024 pixels, the default of the pipeline."""
LATENTS: Final = LatentFacts(
    channels=LATENT_CHANNELS,
    pixels=PIXELS_PER_LATENT,
    multiple=PATCH,
    scaling=LatentScaling(factor=0.3611, shift=0.1159),
    space="flux1",
)

REFERENCES: Final = "reference_latents"
CONTROL: Final = "control_latents"
CONTROL_IMAGE: Final = "control_image"
IMAGE: Final = "image"
MASKED_IMAGE: Final = "masked_image_latents"
MASK: Final = "mask"
_OF_LATENTS: Final = ("batch", LATENT_CHANNELS, "latent_height", "latent_width")
_IMAGES: Final = {
    PACKED_CHANNELS: (
        ArgumentFacts(
            name=REFERENCES,
            shape=(LATENT_CHANNELS, "reference_height", "reference_width"),
            is_list=True,
            is_shared=True,
            is_needed=False,
        ),
    ),
    CONTROL_CHANNELS: (
        ArgumentFacts(name=CONTROL, shape=_OF_LATENTS, is_needed=False),
        ArgumentFacts(name=CONTROL_IMAGE, shape=("pictures", 3, "height", "width"), is_needed=False),
    ),
    FILL_CHANNELS: (
        ArgumentFacts(name=MASKED_IMAGE, shape=_OF_LATENTS, is_needed=False),
        ArgumentFacts(name=IMAGE, shape=("pictures", 3, "height", "width"), is_needed=False),
        ArgumentFacts(name=MASK, shape=("batch", 1, "height", "width")),
    ),
}
"""What an image is made from besides the text, by input channels: latents of a VAE, or a picture that the workers
encode, and pixels of a mask, in [0, 1] with 1 for those that are made anew."""


def facts_of(config: Flux1Config, layout: ParallelLayout) -> TransformerFacts:
    """Return the arguments of ``Call`` and ``Generate``, and the parallel degrees."""
    return TransformerFacts(
        heads=config.heads,
        ulysses=layout.degrees.ulysses,
        ring=layout.degrees.ring,
        arguments=(
            ArgumentFacts(name="hidden_states", shape=("rows", "image_tokens", config.in_channels)),
            ArgumentFacts(name="encoder_hidden_states", shape=("rows", "text_tokens", config.context_channels)),
            ArgumentFacts(name="pooled_projections", shape=("rows", config.pooled_channels)),
            ArgumentFacts(name="timestep", shape=("rows",)),
            ArgumentFacts(name="img_ids", shape=("image_tokens", 3)),
            ArgumentFacts(name="txt_ids", shape=("text_tokens", 3)),
            # diffusers' pipeline gives it to every model; schnell does not read it.
            ArgumentFacts(name="guidance", shape=("rows",), is_needed=config.has_guidance),
        ),
        variants=VARIANTS,
        conditioning=(
            ArgumentFacts(name="prompt_embeds", shape=("batch", "tokens", config.context_channels)),
            ArgumentFacts(name="pooled_prompt_embeds", shape=("batch", config.pooled_channels)),
            *_IMAGES[config.in_channels],
        ),
        latents=LATENTS,
        guidance="embedded" if config.has_guidance else "none",
        default_guidance_scale=30.0 if config.in_channels == FILL_CHANNELS else 3.5,
        default_steps=50 if config.in_channels == FILL_CHANNELS else 28,
        starts=("image", "mask") if config.in_channels == PACKED_CHANNELS else (),
        has_step_cache=True,
        prompt=FACTS,
    )
