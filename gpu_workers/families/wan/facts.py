"""The facts of a Wan transformer that clients get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from xditd.gpu_workers.families.wan.config import (
    CONTROL_CHANNELS,
    FRAMES,
    IMAGE_TOKENS,
    WanConfig,
    WanVaceConfig,
)
from xditd.gpu_workers.families.wan.prompt import FACTS
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, LatentScaling, TransformerFacts

COMFYUI: Final = "comfyui"
"""ComfyUI's arithmetic: the frequencies of the time's embedding are powers, which differ in the last bits."""

PROMPT: Final = "prompt_embeds"
NEGATIVE: Final = "negative_prompt_embeds"

IMAGE: Final = "image"
"""The first frame, in [-1, 1]: of each row, or one for all."""
LAST_IMAGE: Final = "last_image"
IMAGE_EMBEDS: Final = "image_embeds"
"""The states of CLIP's vision model before its last layer: of the first image, and of the last of models for two."""

VIDEO: Final = "video"
"""VACE's control video, in [-1, 1]."""
MASK: Final = "mask"
"""Of the control video, 0 to 1: what is made anew is above 0.5."""
REFERENCES: Final = "reference_images"
CONTROL_SCALES: Final = "conditioning_scales"
"""A weight for each control block."""
CONTROL_SCALE: Final = "conditioning_scale"
"""One weight for all control blocks, 1 unless given."""

SHIFT: Final = "shift"
"""Of the schedule: 3 unless given, 5 of TI2V."""
EULER: Final = "euler"
"""Steps by ``FlowMatchEulerDiscreteScheduler``, not ``UniPCMultistepScheduler``."""
BOUNDARY: Final = "boundary_ratio"
"""The time, from 0 to 1, below which the second transformer predicts."""
SECOND_SCALE: Final = "guidance_scale_2"
"""The guidance scale of the second transformer; that of the first unless given."""


def transformer_facts(config: WanConfig, layout: ParallelLayout) -> TransformerFacts:
    """Return the arguments of ``Call`` and ``Generate``. Defaults are those of diffusers' pipelines."""
    shape = ("rows", "image_tokens") if config.images == 1 else ("images", IMAGE_TOKENS)
    image = ArgumentFacts(name="encoder_hidden_states_image", shape=(*shape, config.image_channels))
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
            *_pictures(config),
        ),
        latents=LatentFacts(
            channels=config.out_channels,
            pixels=config.pixels,
            multiple=2,
            frames=FRAMES,
            scaling=LatentScaling(factor=1.0, shift=0.0),  # its VAE normalises each channel by its own statistics
            space="wan_2_2" if config.has_time_per_token else "wan_2_1",
        ),
        options=(SHIFT, EULER, BOUNDARY, SECOND_SCALE),
        stages=2,
        guidance="classifier_free",
        default_guidance_scale=5.0,
        default_steps=50,
        default_height=480,
        default_width=832,
        default_frames=81,
        default_fps=24 if config.has_time_per_token else 16,
        prompt=FACTS,
    )


def _pictures(config: WanConfig) -> Iterator[ArgumentFacts]:
    """Yield the pictures that a generation takes."""
    if config.has_image_latents or config.has_time_per_token:
        needed = config.has_image_latents
        yield ArgumentFacts(name=IMAGE, shape=("images", 3, "height", "width"), is_needed=needed)
    if config.has_image_latents:
        two = config.has_image_positions
        yield ArgumentFacts(name=LAST_IMAGE, shape=("images", 3, "height", "width"), is_needed=two)
    if config.image_channels:
        yield ArgumentFacts(name=IMAGE_EMBEDS, shape=("image_states", IMAGE_TOKENS, config.image_channels))


def vace_facts(config: WanVaceConfig, layout: ParallelLayout) -> TransformerFacts:
    """Return those of VACE. Defaults are those of diffusers' ``WanVACEPipeline``."""
    plain = transformer_facts(config, layout)
    control = ("controls", CONTROL_CHANNELS, "control_frames", "latent_rows", "latent_columns")
    video = ("height", "width")
    return msgspec.structs.replace(
        plain,
        arguments=(
            *plain.arguments,
            ArgumentFacts(name="control_hidden_states", shape=control),
            ArgumentFacts(name="control_hidden_states_scale", shape=(config.control_blocks,), is_needed=False),
        ),
        conditioning=(
            *plain.conditioning,
            ArgumentFacts(name=VIDEO, shape=("videos", 3, "frames", *video), is_needed=False),
            ArgumentFacts(name=MASK, shape=("videos", 1, "frames", *video), is_needed=False),
            ArgumentFacts(name=REFERENCES, shape=(3, *video), is_list=True, is_shared=True, is_needed=False),
            ArgumentFacts(name=CONTROL_SCALES, shape=(config.control_blocks,), is_needed=False),
        ),
        options=(*plain.options, CONTROL_SCALE),
    )
