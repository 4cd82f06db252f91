"""Tiny pipelines that make images with a transformer: those of other families than FLUX."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from class_entry import Random
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPlusPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from pipeline_entry import PipelineEntry
from pipeline_parts import embeddings, flux_vae, generator, image, kl_vae, mask, seeded, tensors

STEPS = {"num_inference_steps": 2, "output_type": "pt"}
TRANSFORMER_AND_VAE = ("transformer", "vae")


# ---- Qwen-Image ----

QWEN_CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_vae() -> AutoencoderKLQwenImage:
    """Return a VAE that makes the sides four times smaller, as its number of downsamplings says."""
    return seeded(
        AutoencoderKLQwenImage(
            base_dim=12,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.0, 1.5, 2.0, 0.5],
        )
    )


def qwen_parts() -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "transformer": seeded(QwenImageTransformer2DModel(num_layers=2, **QWEN_CONFIG)),
        "vae": qwen_vae(),
        "text_encoder": None,
        "tokenizer": None,
    }


def qwen_call(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call with true classifier-free guidance, whose shorter prompt is padded."""
    return {
        "prompt_embeds": embeddings(1, 7, 16),
        "prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "negative_prompt_embeds": embeddings(1, 4, 16, seed=4),
        "negative_prompt_embeds_mask": torch.tensor([[1, 1, 1, 1]]),
        "true_cfg_scale": 3.0,
        "height": 16,
        "width": 24,
        "generator": generator(),
        **STEPS,
        **arguments,
    }


def run_qwen(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**qwen_call()).images)


def run_qwen_inpaint(pipe: Any) -> list[torch.Tensor]:
    arguments = qwen_call(image=image(24, 16), mask_image=mask(24, 16), strength=0.7, num_inference_steps=3)
    return tensors(pipe(**arguments).images)


def run_qwen_edit(pipe: Any) -> list[torch.Tensor]:
    """Edit two images. The pipeline resizes each to a million pixels: here to 32 times 32 of them."""
    with patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32):
        return tensors(pipe(**qwen_call(image=[image(20, 20), image(30, 20, seed=8)])).images)


def build_qwen_controlnet() -> QwenImageControlNetPipeline:
    controlnet = seeded(QwenImageControlNetModel(num_layers=1, **QWEN_CONFIG), seed=1)
    return QwenImageControlNetPipeline(controlnet=controlnet, **qwen_parts())


def run_qwen_controlnet(pipe: Any) -> list[torch.Tensor]:
    arguments = qwen_call(control_image=image(24, 16), controlnet_conditioning_scale=0.6)
    return tensors(pipe(**arguments).images)


QWEN_ENTRIES = (
    PipelineEntry(
        "qwen-image", "text-to-image", lambda: QwenImagePipeline(**qwen_parts()), run_qwen, TRANSFORMER_AND_VAE
    ),
    PipelineEntry(
        "qwen-image-inpaint",
        "inpaint",
        lambda: QwenImageInpaintPipeline(**qwen_parts()),
        run_qwen_inpaint,
        TRANSFORMER_AND_VAE,
    ),
    PipelineEntry(
        "qwen-image-edit-plus",
        "edit",
        lambda: QwenImageEditPlusPipeline(processor=None, **qwen_parts()),
        run_qwen_edit,
        TRANSFORMER_AND_VAE,
    ),
    PipelineEntry(
        "qwen-image-controlnet",
        "controlnet",
        build_qwen_controlnet,
        run_qwen_controlnet,
        ("transformer", "controlnet", "vae"),
    ),
)


# ---- Stable Diffusion 3 ----

SD3_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}
SD3_TEXT = dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])


def sd3_parts(**changes: Any) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": seeded(SD3Transformer2DModel(num_layers=3, dual_attention_layers=(0,), **SD3_CONFIG)),
        "vae": flux_vae(latent_channels=4),
        **SD3_TEXT,
        **changes,
    }


def sd3_call(**arguments: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(1, 7, 32),
        "negative_prompt_embeds": embeddings(1, 7, 32, seed=4),
        "pooled_prompt_embeds": embeddings(1, 16, seed=3),
        "negative_pooled_prompt_embeds": embeddings(1, 16, seed=5),
        "guidance_scale": 5.0,
        "height": 16,
        "width": 24,
        "generator": generator(),
        **STEPS,
        **arguments,
    }


def run_sd3(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**sd3_call()).images)


def run_sd3_skipping_layers(pipe: Any) -> list[torch.Tensor]:
    """Call the transformer a third time in a step, without one of its blocks."""
    layers = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    arguments = sd3_call(num_inference_steps=3, **layers)
    return tensors(pipe(**arguments).images)


def build_sd3_controlnet() -> StableDiffusion3ControlNetPipeline:
    controlnet = seeded(SD3ControlNetModel(num_layers=1, **SD3_CONFIG), seed=1)
    return StableDiffusion3ControlNetPipeline(controlnet=controlnet, **sd3_parts())


def run_sd3_controlnet(pipe: Any) -> list[torch.Tensor]:
    """The pipeline draws the latents of the control image from PyTorch's own generator."""
    arguments = sd3_call(control_image=image(24, 16), controlnet_conditioning_scale=0.6, control_guidance_end=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(pipe(**arguments).images)


def sd3_lora_weights() -> dict[str, torch.Tensor]:
    random = Random(33)
    weights = {}
    for block in range(3):
        for projection in ("to_q", "add_k_proj"):
            layer = f"transformer.transformer_blocks.{block}.attn.{projection}"
            weights[f"{layer}.lora_A.weight"] = random.normal(2, 32) / 32**0.5
            weights[f"{layer}.lora_B.weight"] = random.normal(32, 2) / 2**0.5
    return weights


def build_sd3_lora() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline(**sd3_parts())
    pipe.load_lora_weights(sd3_lora_weights())
    return pipe


def run_sd3_lora(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**sd3_call(joint_attention_kwargs={"scale": 0.7})).images)


SD3_ENTRIES = (
    PipelineEntry(
        "sd3", "text-to-image", lambda: StableDiffusion3Pipeline(**sd3_parts()), run_sd3, TRANSFORMER_AND_VAE
    ),
    PipelineEntry(
        "sd3-skipping-layers",
        "text-to-image",
        lambda: StableDiffusion3Pipeline(**sd3_parts()),
        run_sd3_skipping_layers,
        TRANSFORMER_AND_VAE,
    ),
    PipelineEntry(
        "sd3-controlnet", "controlnet", build_sd3_controlnet, run_sd3_controlnet, ("transformer", "controlnet", "vae")
    ),
    PipelineEntry("sd3-lora", "lora", build_sd3_lora, run_sd3_lora, TRANSFORMER_AND_VAE),
)


# ---- Z-Image, Sana, Lumina 2 and Chroma ----


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


def run_with_masks(pipe: Any) -> list[torch.Tensor]:
    """Call a pipeline that takes the masks of its prompts: Sana and Lumina 2."""
    only_sana = {"use_resolution_binning": False, "negative_prompt": None} if isinstance(pipe, SanaPipeline) else {}
    images = pipe(
        prompt_embeds=embeddings(1, 7, 8),
        prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        negative_prompt_embeds=embeddings(1, 7, 8, seed=4),
        negative_prompt_attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0, 0]]),
        guidance_scale=4.0,
        height=32,
        width=32,
        generator=generator(),
        **only_sana,
        **STEPS,
    ).images
    return tensors(images)


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
    *QWEN_ENTRIES,
    *SD3_ENTRIES,
    PipelineEntry("z-image", "text-to-image", build_z_image, run_z_image, TRANSFORMER_AND_VAE),
    PipelineEntry("sana", "text-to-image", build_sana, run_with_masks, TRANSFORMER_AND_VAE),
    PipelineEntry("lumina2", "text-to-image", build_lumina2, run_with_masks, TRANSFORMER_AND_VAE),
    PipelineEntry("chroma", "text-to-image", build_chroma, run_chroma, TRANSFORMER_AND_VAE),
)
