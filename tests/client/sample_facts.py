"""Facts for tests: of a transformer, a VAE and a text encoder with small sizes."""

from __future__ import annotations

from msgspec.structs import replace

from xditd.ipc.facts import (
    ArgumentFacts,
    ComponentFacts,
    LatentFacts,
    LatentScaling,
    TextEncoderFacts,
    TransformerFacts,
    VaeFacts,
)
from xditd.ipc.tensors import ComponentKind, Manifest

CONTEXT, POOLED, WIDTH = 8, 4, 6
LATENTS = LatentFacts(channels=16, pixels=8, multiple=2, scaling=LatentScaling(factor=1.5305, shift=0.0609))
"""SD3's scaling, which differs from that of the VAE below."""

TRANSFORMER = ComponentFacts(
    family="flux1",
    class_name="FluxTransformer2DModel",
    kind=ComponentKind.TRANSFORMER,
    dtype="float32",
    bytes_by_dtype={"float32": 64},
    transformer=TransformerFacts(
        heads=24,
        ulysses=2,
        ring=1,
        arguments=(
            ArgumentFacts(name="hidden_states", shape=("rows", "image_tokens", 64)),
            ArgumentFacts(name="encoder_hidden_states", shape=("rows", "text_tokens", CONTEXT)),
            ArgumentFacts(name="timestep", shape=("rows",)),
        ),
        variants=("class", "float32_time"),
        conditioning=(
            ArgumentFacts(name="prompt_embeds", shape=("batch", "tokens", CONTEXT)),
            ArgumentFacts(name="pooled_prompt_embeds", shape=("batch", POOLED)),
        ),
        options=("shift",),
        latents=LATENTS,
        guidance="embedded",
        default_guidance_scale=3.5,
        default_steps=28,
        has_step_cache=True,
    ),
)
"""Like FLUX.1: conditioning tensors have a row for each image."""

LISTS = ComponentFacts(
    family="z_image",
    class_name="ZImageTransformer2DModel",
    kind=ComponentKind.TRANSFORMER,
    dtype="bfloat16",
    bytes_by_dtype={"bfloat16": 64},
    transformer=TransformerFacts(
        heads=30,
        ulysses=2,
        ring=1,
        arguments=(
            ArgumentFacts(name="x", shape=(16, 1, "height", "width"), is_list=True),
            ArgumentFacts(name="t", shape=("rows",)),
            ArgumentFacts(name="cap_feats", shape=("tokens", CONTEXT), is_list=True),
        ),
        variants=("class",),
        conditioning=(
            ArgumentFacts(name="prompt_embeds", shape=("tokens", CONTEXT), is_list=True),
            ArgumentFacts(name="negative_prompt_embeds", shape=("tokens", CONTEXT), is_list=True, is_needed=False),
        ),
        latents=LATENTS,
        guidance="classifier_free",
        default_guidance_scale=0.0,
        default_steps=9,
    ),
)
"""Like Z-Image: conditioning is lists with a tensor for each image."""

VAE = ComponentFacts(
    family="flux_vae",
    class_name="AutoencoderKL",
    kind=ComponentKind.VAE,
    dtype="float32",
    bytes_by_dtype={"float32": 64},
    vae=VaeFacts(
        latents=LatentFacts(channels=16, pixels=8, scaling=LatentScaling(factor=0.36, shift=0.12), space="flux1"),
        image_channels=3,
        has_encoder=True,
    ),
)

TEXT_ENCODER = ComponentFacts(
    family="clip_l",
    class_name="CLIPTextModel",
    kind=ComponentKind.TEXT_ENCODER,
    dtype="float32",
    bytes_by_dtype={"float32": 64},
    text_encoder=TextEncoderFacts(width=WIDTH, max_tokens=77, has_pooled=True),
)


VIDEO_LATENTS = replace(LATENTS, frames=4, scaling=LatentScaling(factor=1.0, shift=0.0))
assert TRANSFORMER.transformer is not None
VIDEO = replace(TRANSFORMER, transformer=replace(TRANSFORMER.transformer, latents=VIDEO_LATENTS, stages=2))
"""A transformer of videos, of which a second one may run the steps at low noise."""

assert VAE.vae is not None
VIDEO_VAE = replace(VAE, vae=replace(VAE.vae, latents=replace(VIDEO_LATENTS, multiple=1)))


def of(manifest: Manifest) -> ComponentFacts:
    """Facts for a component, by the kind in its manifest or else by its tensors' names."""
    if manifest.kind is not None:
        return next(each for each in (TRANSFORMER, VAE, TEXT_ENCODER) if each.kind is manifest.kind)
    name = manifest.tensors[0].name
    return VAE if name.startswith("decoder.") else TEXT_ENCODER if name.startswith("text_model.") else TRANSFORMER
