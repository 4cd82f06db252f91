"""Tiny pipelines of Qwen-Image and of Stable Diffusion 3."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from class_entry import Random
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPlusPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from pipeline_entry import PipelineEntry
from pipeline_parts import STEPS, TRANSFORMER_AND_VAE, embeddings, flux_vae, generator, image, mask, seeded, tensors

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


ENTRIES = (*QWEN_ENTRIES, *SD3_ENTRIES)
