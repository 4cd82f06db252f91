"""Tiny modular pipelines: FLUX.1, Anima, FLUX.3, and MiniMax-H3 with its two transformers.

They run without their blocks for text, and are given what those make.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from class_entry import Random
from diffusers import (
    AnimaTextConditioner,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux3Transformer2DModel,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import MINIMAX_H3_TEXT_TAG
from flux_pipelines import flux_call, flux_transformer
from kv_cache_pipelines import flux2_vae
from pipeline_entry import PipelineEntry
from pipeline_parts import STEPS, TRANSFORMER_AND_VAE, embeddings, flux_vae, generator, image, seeded, tensors
from qwen_and_sd3_pipelines import qwen_vae


def modular_pipeline(blocks_class: str, without: tuple[str, ...] = ("text_encoder",), **components: Any) -> Any:
    """Return the pipeline of a class of blocks, without some of them."""
    blocks = getattr(diffusers.modular_pipelines, blocks_class)()
    for name in without:
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    return pipe


# ---- FLUX.1 ----


def build_flux() -> Any:
    return modular_pipeline(
        "FluxAutoBlocks",
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        transformer=flux_transformer(),
        vae=flux_vae(latent_channels=4),
    )


def run_flux(pipe: Any) -> list[torch.Tensor]:
    """Return images made from text, and then from an image, whose sides the pipeline rounds to multiples of 16."""
    results = tensors(pipe(**flux_call()).get("images"))
    arguments = flux_call(image=image(32, 16), width=32, strength=0.7, num_inference_steps=3)
    return results + tensors(pipe(**arguments).get("images"))


# ---- Anima ----


def build_anima() -> Any:
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # diffusers resizes the mask with torchvision
    )
    conditioner = AnimaTextConditioner(
        source_dim=16,
        target_dim=16,
        model_dim=16,
        num_layers=2,
        num_attention_heads=4,
        target_vocab_size=64,
        min_sequence_length=8,
    )
    return modular_pipeline(
        "AnimaAutoBlocks",
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_conditioner=seeded(conditioner),
        transformer=seeded(transformer),
        vae=qwen_vae(),
    )


def run_anima(pipe: Any) -> list[torch.Tensor]:
    """Call the pipeline with a prompt and a shorter negative one, each as two text encoders' tokens see it."""
    random = Random(40)
    prompts = {}
    for kind, length in (("", 7), ("negative_", 4)):
        prompts[f"{kind}qwen_prompt_embeds"] = random.normal(1, length, 16)
        prompts[f"{kind}qwen_attention_mask"] = torch.ones(1, length, dtype=torch.int64)
        prompts[f"{kind}t5_input_ids"] = random.integers(0, 64, 1, length + 1)
        prompts[f"{kind}t5_attention_mask"] = torch.ones(1, length + 1, dtype=torch.int64)
    return tensors(pipe(**prompts, height=16, width=24, generator=generator(), **STEPS).get("images"))


# ---- FLUX.3 ----


def build_flux3() -> Any:
    transformer = Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return modular_pipeline(
        "Flux3AutoBlocks",
        without=("prompt_upsampler", "text_encoder"),
        transformer=seeded(transformer),
        vae=flux2_vae(),
    )


def run_flux3(pipe: Any) -> list[torch.Tensor]:
    """Return an image made from text, and one made with a reference too."""
    arguments = {
        "prompt_embeds": embeddings(1, 7, 16),
        "negative_prompt_embeds": embeddings(1, 5, 16, seed=4),
        "height": 64,
        "width": 64,
        **STEPS,
    }
    results = tensors(pipe(**arguments, generator=generator()).get("images"))
    return results + tensors(pipe(**arguments, generator=generator(), image=[image(64, 64)]).get("images"))


# ---- MiniMax-H3 ----


def minimax_h3_transformer(seed: int) -> MiniMaxH3Transformer3DModel:
    return seeded(
        MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=32,
            time_embed_hidden_dim=32,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        seed,
    )


def build_minimax_h3() -> Any:
    """Return the pipeline with both transformers: for text and keyframes, and for references."""
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        latents_mean=(0.1, -0.1, 0.2, 0.0),
        latents_std=(1.0, 1.5, 2.0, 0.5),
    )
    audio_vae = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4,
        encoder_rates=(2, 2),
        latent_dim=16,
        latent_channels=4,
        num_attention_heads=2,
        decoder_dim=8,
        decoder_rates=(2, 2),
        decoder_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
        sampling_rate=160,
        latents_mean=(0.1, -0.1, 0.2, 0.0),
        latents_std=(1.0, 1.5, 2.0, 0.5),
    )
    return modular_pipeline(
        "MiniMaxH3Blocks",
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        transformer=minimax_h3_transformer(seed=0),
        transformer_ref=minimax_h3_transformer(seed=1),
        vae=seeded(vae),
        audio_vae=seeded(audio_vae),
        reference_image_short_edge=64,
    )


def minimax_h3_call(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call for 124 frames, the least number that the pipeline takes.

    Its schedulers count both ends, so that three steps are two calls of the transformer.
    """
    return {
        "prompt_embeds": embeddings(1, 7, 16),
        "text_token_tags": torch.full((7,), MINIMAX_H3_TEXT_TAG),
        "height": 32,
        "width": 32,
        "num_frames": 124,
        "num_inference_steps": 3,
        "generator": generator(),
        "output_type": "pt",
        **arguments,
    }


def run_minimax_h3(pipe: Any) -> list[torch.Tensor]:
    state = pipe(**minimax_h3_call())
    return tensors([state.get("videos"), state.get("audio")])


def run_minimax_h3_keyframe(pipe: Any) -> list[torch.Tensor]:
    state = pipe(**minimax_h3_call(image=image(48, 80)))
    return tensors([state.get("videos"), state.get("audio")])


def run_minimax_h3_reference(pipe: Any) -> list[torch.Tensor]:
    state = pipe(**minimax_h3_call(references=[MiniMaxH3ImageReference(image(64, 64))]))
    return tensors([state.get("videos"), state.get("audio")])


MINIMAX_H3_DECODERS = ("vae", "audio_vae")

ENTRIES = (
    PipelineEntry("modular-flux", "modular", build_flux, run_flux, TRANSFORMER_AND_VAE),
    PipelineEntry("modular-anima", "modular", build_anima, run_anima, ("text_conditioner", "transformer", "vae")),
    PipelineEntry("modular-flux3", "modular", build_flux3, run_flux3, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "minimax-h3", "video-with-sound", build_minimax_h3, run_minimax_h3, ("transformer", *MINIMAX_H3_DECODERS)
    ),
    PipelineEntry(
        "minimax-h3-keyframe",
        "image-to-video",
        build_minimax_h3,
        run_minimax_h3_keyframe,
        ("transformer", *MINIMAX_H3_DECODERS),
    ),
    PipelineEntry(
        "minimax-h3-reference",
        "two-transformers",
        build_minimax_h3,
        run_minimax_h3_reference,
        ("transformer_ref", *MINIMAX_H3_DECODERS),
    ),
)
