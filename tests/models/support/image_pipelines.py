"""Tiny pipelines of Z-Image, Sana, Lumina 2 and Chroma."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from pipeline_entry import PipelineEntry
from pipeline_parts import STEPS, TRANSFORMER_AND_VAE, embeddings, flux_vae, generator, kl_vae, seeded, tensors


def build_z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=seeded(transformer),
        vae=kl_vae(4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=None,
        tokenizer=None,
    )


def run_z_image(pipe: Any) -> list[torch.Tensor]:
    """Call the pipeline with two prompts of different lengths, which are lists of tensors."""
    images = pipe(
        prompt_embeds=[embeddings(7, 16), embeddings(5, 16, seed=3)],
        negative_prompt_embeds=[embeddings(4, 16, seed=4), embeddings(4, 16, seed=4)],
        guidance_scale=3.0,
        cfg_normalization=True,
        height=16,
        width=24,
        generator=generator(),
        **STEPS,
    ).images
    return tensors(images)


def build_sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=seeded(transformer),
        vae=seeded(vae),
        text_encoder=None,
        tokenizer=None,
    )


def masked_prompts() -> dict[str, Any]:
    """Return the arguments of a call with embeddings and masks of padded prompts."""
    return {
        "prompt_embeds": embeddings(1, 7, 8),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "negative_prompt_embeds": embeddings(1, 7, 8, seed=4),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]),
        "guidance_scale": 4.0,
        "height": 32,
        "width": 32,
        "generator": generator(),
        **STEPS,
    }


def run_sana(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**masked_prompts(), negative_prompt=None, use_resolution_binning=False).images)


def run_lumina2(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**masked_prompts()).images)


def build_lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=seeded(transformer),
        vae=flux_vae(latent_channels=4, halvings=3),
        text_encoder=None,
        tokenizer=None,
    )


def build_chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=seeded(transformer),
        vae=flux_vae(latent_channels=4),
        text_encoder=None,
        tokenizer=None,
    )


def run_chroma(pipe: Any) -> list[torch.Tensor]:
    images = pipe(
        prompt_embeds=embeddings(1, 7, 32),
        prompt_attention_mask=torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]),
        negative_prompt_embeds=embeddings(1, 7, 32, seed=4),
        negative_prompt_attention_mask=torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]),
        guidance_scale=4.0,
        height=16,
        width=24,
        generator=generator(),
        **STEPS,
    ).images
    return tensors(images)


ENTRIES = (
    PipelineEntry("z-image", "text-to-image", build_z_image, run_z_image, TRANSFORMER_AND_VAE),
    PipelineEntry("sana", "text-to-image", build_sana, run_sana, TRANSFORMER_AND_VAE),
    PipelineEntry("lumina2", "text-to-image", build_lumina2, run_lumina2, TRANSFORMER_AND_VAE),
    PipelineEntry("chroma", "text-to-image", build_chroma, run_chroma, TRANSFORMER_AND_VAE),
)
