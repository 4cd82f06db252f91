"""Tiny pipelines of FLUX.2, and those whose transformer keeps keys and values from call to call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from pipeline_entry import PipelineEntry
from pipeline_parts import NEGATIVE_PROMPT, PROMPT, TRANSFORMER_AND_VAE, embeddings, generator, image, seeded, tensors
from qwen3_vl_parts import qwen3_vl_processor, qwen3_vl_text_encoder

# ---- FLUX.2 ----


def flux2_vae() -> AutoencoderKLFlux2:
    """Return a VAE whose batch normalization, which the pipelines read, does change the latents."""
    vae = AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean.copy_(torch.tensor([0.1, -0.1, 0.2, 0.0]))
    vae.bn.running_var.copy_(torch.tensor([1.0, 1.5, 2.0, 0.5]))
    return seeded(vae)


def flux2(pipeline_class: Any = Flux2Pipeline, *, with_guidance: bool = True) -> Any:
    transformer = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=with_guidance,
    )
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=seeded(transformer),
        vae=flux2_vae(),
        text_encoder=None,
        tokenizer=None,
    )


def flux2_call(**arguments: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(1, 7, 16),
        "height": 8,
        "width": 12,
        "num_inference_steps": 3,
        "generator": generator(),
        "output_type": "pt",
        **arguments,
    }


def run_flux2(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**flux2_call(guidance_scale=4.0)).images)


def run_flux2_references(pipe: Any) -> list[torch.Tensor]:
    """Edit two images of different sizes; 64 pixels is the least that the pipeline takes."""
    references = [image(64, 64), image(80, 64, seed=8)]
    return tensors(pipe(**flux2_call(image=references)).images)


def run_flux2_guided(pipe: Any) -> list[torch.Tensor]:
    arguments = flux2_call(negative_prompt_embeds=embeddings(1, 5, 16, seed=4), guidance_scale=3.0)
    return tensors(pipe(**arguments).images)


def build_flux2_with_text_encoder() -> Flux2Pipeline:
    """Return FLUX.2 with Qwen3-VL in the place of Mistral 3: both generate text, and take messages of a chat.

    A quarter of its tokens end a text, so that it writes a few words alone.
    """
    pipe = flux2()
    text_encoder = qwen3_vl_text_encoder(16)
    text_encoder.generation_config.eos_token_id = list(range(0, 288, 4))
    text_encoder.generation_config.pad_token_id = 256
    pipe.register_modules(text_encoder=text_encoder, tokenizer=qwen3_vl_processor())
    return pipe


def run_flux2_upsampled_prompt(pipe: Any) -> list[torch.Tensor]:
    """Let the text encoder write a longer prompt, which it samples by PyTorch's own generator."""
    arguments = flux2_call(prompt=PROMPT, prompt_embeds=None, caption_upsample_temperature=0.5, guidance_scale=4.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(pipe(**arguments, max_sequence_length=512, text_encoder_out_layers=(1,)).images)


# ---- Qwen-Image 2.1 ----


def build_qwen_image_21() -> QwenImage21Pipeline:
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=3,
        decoder_base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=seeded(transformer),
        vae=seeded(vae),
        text_encoder=qwen3_vl_text_encoder(16),
        processor=qwen3_vl_processor(),
    )


def qwen_image_21_call(**arguments: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "true_cfg_scale": 3.0,
        "num_inference_steps": 3,
        "output_resolution": 64,
        "generator": generator(),
        "output_type": "pt",
        **arguments,
    }


def run_qwen_image_21(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**qwen_image_21_call()).images)


def run_qwen_image_21_edit(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**qwen_image_21_call(image=[image(64, 64)])).images)


def run_qwen_image_21_uncached(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**qwen_image_21_call(use_kv_cache=False)).images)


# ---- GLM-Image ----


def build_glm_image() -> GlmImagePipeline:
    """Return the pipeline without the language model, whose tokens a caller may give."""
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=128,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )
    return GlmImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=seeded(transformer),
        vae=seeded(vae),
        text_encoder=None,
        tokenizer=None,
        processor=None,
        vision_language_encoder=None,
    )


def glm_call(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call for an image of 32 by 48 pixels, whose prior has a token for 16 by 16 of them."""
    return {
        "prompt_embeds": embeddings(1, 7, 32),
        "negative_prompt_embeds": embeddings(1, 7, 32, seed=4),
        "prior_token_ids": torch.tensor([[5, 60, 17, 99, 2, 33]]),
        "guidance_scale": 2.0,
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "generator": generator(),
        "output_type": "pt",
        **arguments,
    }


def run_glm_image(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**glm_call()).images)


def run_glm_image_edit(pipe: Any) -> list[torch.Tensor]:
    arguments = glm_call(
        image=[image(32, 32)],
        prior_token_image_ids=[torch.tensor([7, 8, 9, 10])],
        source_image_grid_thw=[torch.tensor([[1, 2, 2]])],
    )
    return tensors(pipe(**arguments).images)


ENTRIES = (
    PipelineEntry("flux2", "text-to-image", flux2, run_flux2, TRANSFORMER_AND_VAE),
    PipelineEntry("flux2-references", "edit", flux2, run_flux2_references, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "flux2-upsampled-prompt",
        "text-encoder",
        build_flux2_with_text_encoder,
        run_flux2_upsampled_prompt,
        ("text_encoder", "transformer", "vae"),
    ),
    PipelineEntry(
        "flux2-klein",
        "text-to-image",
        lambda: flux2(Flux2KleinPipeline, with_guidance=False),
        run_flux2_guided,
        TRANSFORMER_AND_VAE,
    ),
    PipelineEntry(
        "flux2-klein-kv",
        "kv-cache",
        lambda: flux2(Flux2KleinKVPipeline, with_guidance=False),
        run_flux2_references,
        TRANSFORMER_AND_VAE,
    ),
    PipelineEntry(
        "qwen-image-21",
        "kv-cache",
        build_qwen_image_21,
        run_qwen_image_21,
        ("text_encoder", "transformer", "vae"),
    ),
    PipelineEntry(
        "qwen-image-21-edit",
        "kv-cache",
        build_qwen_image_21,
        run_qwen_image_21_edit,
        ("text_encoder", "transformer", "vae"),
    ),
    PipelineEntry(
        "qwen-image-21-uncached",
        "text-to-image",
        build_qwen_image_21,
        run_qwen_image_21_uncached,
        ("text_encoder", "transformer", "vae"),
    ),
    PipelineEntry("glm-image", "text-to-image", build_glm_image, run_glm_image, TRANSFORMER_AND_VAE),
    PipelineEntry("glm-image-edit", "kv-cache", build_glm_image, run_glm_image_edit, TRANSFORMER_AND_VAE),
)
