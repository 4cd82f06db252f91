"""Tiny pipelines of Stable Diffusion, SDXL and Stable Video Diffusion, whose denoiser is a U-Net."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from pipeline_entry import PipelineEntry
from pipeline_parts import (
    NEGATIVE_PROMPT,
    PROMPT,
    clip_text_encoder,
    embeddings,
    generator,
    image,
    kl_vae,
    seeded,
    tensors,
    tokenizer,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

TEXT_SIZE = 8
WITHOUT_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def unet(**config: Any) -> UNet2DConditionModel:
    return seeded(
        UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
            attention_head_dim=4,
            **config,
        )
    )


def stable_diffusion_parts() -> dict[str, Any]:
    return {
        "scheduler": DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear"
        ),
        "unet": unet(cross_attention_dim=TEXT_SIZE),
        "vae": kl_vae(4),
        "text_encoder": clip_text_encoder(TEXT_SIZE),
        "tokenizer": tokenizer(with_start=True),
        **WITHOUT_SAFETY_CHECKER,
    }


def stable_diffusion_call(**arguments: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "guidance_scale": 5.0,
        "num_inference_steps": 2,
        "generator": generator(),
        "output_type": "pt",
        **arguments,
    }


def run_stable_diffusion(pipe: Any) -> list[torch.Tensor]:
    arguments = stable_diffusion_call(height=16, width=24, num_images_per_prompt=2, eta=0.5)
    return tensors(pipe(**arguments).images)


def run_stable_diffusion_image_to_image(pipe: Any) -> list[torch.Tensor]:
    arguments = stable_diffusion_call(image=image(24, 16), strength=0.8, num_inference_steps=3)
    return tensors(pipe(**arguments).images)


def build_stable_diffusion_controlnet() -> StableDiffusionControlNetPipeline:
    controlnet = ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=TEXT_SIZE,
        conditioning_embedding_out_channels=(4, 4),
        norm_num_groups=2,
        attention_head_dim=4,
    )
    return StableDiffusionControlNetPipeline(controlnet=seeded(controlnet, seed=1), **stable_diffusion_parts())


def run_stable_diffusion_controlnet(pipe: Any) -> list[torch.Tensor]:
    arguments = stable_diffusion_call(image=image(24, 16), controlnet_conditioning_scale=0.6)
    return tensors(pipe(**arguments).images)


def build_stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Return the pipeline without text encoders. Six numbers of the image's size, 8 values each, join the text's 16."""
    denoiser = unet(
        cross_attention_dim=TEXT_SIZE,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        unet=denoiser,
        vae=kl_vae(4, force_upcast=False),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def run_stable_diffusion_xl(pipe: Any) -> list[torch.Tensor]:
    embeds = {
        "prompt_embeds": embeddings(1, 7, TEXT_SIZE),
        "negative_prompt_embeds": embeddings(1, 7, TEXT_SIZE, seed=4),
        "pooled_prompt_embeds": embeddings(1, 16, seed=3),
        "negative_pooled_prompt_embeds": embeddings(1, 16, seed=5),
    }
    arguments = stable_diffusion_call(height=16, width=24, prompt=None, negative_prompt=None, **embeds)
    return tensors(pipe(**arguments).images)


def build_perturbed_attention() -> StableDiffusionPAGPipeline:
    """Return a pipeline that sets attention processors of its own at the start of a call, and puts back the former."""
    return StableDiffusionPAGPipeline(**stable_diffusion_parts(), pag_applied_layers=["mid"])


def run_perturbed_attention(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**stable_diffusion_call(pag_scale=2.0, height=16, width=24)).images)


def run_half_precision_xl(pipe: Any) -> list[torch.Tensor]:
    """Call the pipeline in float16, in which it turns the VAE to float32 for the time of the decoding."""
    pipe.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    results = run_stable_diffusion_xl(pipe)
    assert pipe.vae.dtype == torch.float16
    return results


def build_stable_video_diffusion() -> StableVideoDiffusionPipeline:
    """Return the pipeline, which looks for ``num_frames`` in the signature of the VAE's ``forward``."""
    denoiser = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    config = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,  # the pipeline resizes its image to that
        patch_size=112,
    )
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return StableVideoDiffusionPipeline(
        scheduler=scheduler,
        unet=seeded(denoiser),
        vae=seeded(vae),
        image_encoder=seeded(CLIPVisionModelWithProjection(config)),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
    )


def run_stable_video_diffusion(pipe: Any) -> list[torch.Tensor]:
    frames = pipe(
        image=image(24, 16),
        height=16,
        width=24,
        num_frames=3,
        decode_chunk_size=2,
        num_inference_steps=2,
        generator=generator(),
        output_type="pt",
    ).frames
    return tensors(frames)


STABLE_DIFFUSION_COMPONENTS = ("text_encoder", "unet", "vae")

ENTRIES = (
    PipelineEntry(
        "stable-diffusion",
        "unet",
        lambda: StableDiffusionPipeline(**stable_diffusion_parts()),
        run_stable_diffusion,
        STABLE_DIFFUSION_COMPONENTS,
    ),
    PipelineEntry(
        "stable-diffusion-image-to-image",
        "image-to-image",
        lambda: StableDiffusionImg2ImgPipeline(**stable_diffusion_parts()),
        run_stable_diffusion_image_to_image,
        STABLE_DIFFUSION_COMPONENTS,
    ),
    PipelineEntry(
        "stable-diffusion-controlnet",
        "controlnet",
        build_stable_diffusion_controlnet,
        run_stable_diffusion_controlnet,
        ("text_encoder", "unet", "controlnet", "vae"),
    ),
    PipelineEntry("stable-diffusion-xl", "unet", build_stable_diffusion_xl, run_stable_diffusion_xl, ("unet", "vae")),
    PipelineEntry(
        "stable-diffusion-perturbed-attention",
        "changed-model",
        build_perturbed_attention,
        run_perturbed_attention,
        STABLE_DIFFUSION_COMPONENTS,
    ),
    PipelineEntry(
        "stable-diffusion-xl-half-precision", "to", build_stable_diffusion_xl, run_half_precision_xl, ("unet", "vae")
    ),
    PipelineEntry(
        "stable-video-diffusion",
        "unet",
        build_stable_video_diffusion,
        run_stable_video_diffusion,
        ("image_encoder", "unet", "vae"),
    ),
)
