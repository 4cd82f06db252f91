"""The facts of a FLUX.2 transformer that clients get."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.families.flux2.config import AXES, CHANNELS, PIXELS_PER_LATENT, Flux2Config
from xditd.gpu_workers.families.flux2.prompt import prompt_facts
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

FLOAT32_TIME: Final = "float32_time"
"""ComfyUI's variant: sines and cosines of the timestep are computed of its value in float32, which diffusers rounds to
the weights' dtype before it multiplies by 1000; and the epsilon of query and key norms is that of float32, 1.2e-7 (in
diffusers 1e-6)."""

PROMPT: Final = "prompt_embeds"
NEGATIVE: Final = "negative_prompt_embeds"
REFERENCES: Final = "reference_latents"
KV_CACHE: Final = "kv_cache"
"""The option of klein's KV weights: references are computed in the first step alone."""

LATENTS: Final = LatentFacts(
    channels=CHANNELS,
    pixels=PIXELS_PER_LATENT,
    scaling=LatentScaling(factor=1.0, shift=0.0),  # its VAE normalises latents by statistics of its own
    space="flux2",
)


def transformer_facts(config: Flux2Config, layout: ParallelLayout) -> TransformerFacts:
    """Return the arguments of ``Call`` and ``Generate``.

    Defaults are those of dev's pipeline, and of klein's distilled weights, which cannot be told from the base.
    """
    texts = ("batch", "tokens", config.context_channels)
    negative = ArgumentFacts(
        name=NEGATIVE, shape=("batch", "negative_tokens", config.context_channels), is_needed=False
    )
    references = ArgumentFacts(
        name=REFERENCES,
        shape=(CHANNELS, "reference_height", "reference_width"),
        is_list=True,
        is_shared=True,
        is_needed=False,
    )
    return TransformerFacts(
        heads=config.heads,
        ulysses=layout.degrees.ulysses,
        ring=layout.degrees.ring,
        arguments=(
            ArgumentFacts(name="hidden_states", shape=("rows", "image_tokens", CHANNELS)),
            ArgumentFacts(name="encoder_hidden_states", shape=("rows", "text_tokens", config.context_channels)),
            ArgumentFacts(name="timestep", shape=("rows",)),
            ArgumentFacts(name="img_ids", shape=("image_tokens", len(AXES))),
            ArgumentFacts(name="txt_ids", shape=("text_tokens", len(AXES))),
            # dev's pipeline gives it; klein does not read it.
            ArgumentFacts(name="guidance", shape=("rows",), is_needed=config.has_guidance),
        ),
        variants=("class", FLOAT32_TIME),
        conditioning=(
            ArgumentFacts(name=PROMPT, shape=texts),
            *(() if config.has_guidance else (negative,)),
            references,
        ),
        options=() if config.has_guidance else (KV_CACHE,),
        latents=LATENTS,
        guidance="embedded" if config.has_guidance else "classifier_free",
        default_guidance_scale=4.0 if config.has_guidance else 1.0,
        default_steps=50 if config.has_guidance else 4,
        prompt=prompt_facts(config),
    )
