"""Tiny pipelines that make sound, and those of Stable Diffusion, whose denoiser is a U-Net."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    ControlNetModel,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
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
    t5_text_encoder,
    tensors,
    tokenizer,
)

# ---- Stable Audio ----


def build_stable_audio() -> StableAudioPipeline:
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=8,
        cross_attention_input_dim=8,
        global_states_input_dim=16,
        time_proj_dim=8,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=8, min_value=0, max_value=32)
    return StableAudioPipeline(
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
        transformer=seeded(transformer),
        vae=seeded(vae),
        projection_model=seeded(projection),
        text_encoder=t5_text_encoder(16),
        tokenizer=tokenizer(max_length=8),
    )


def run_stable_audio(pipe: Any) -> list[torch.Tensor]:
    """Return the waves that start from given ones."""
    audios = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        audio_end_in_s=6.0,
        guidance_scale=4.0,
        num_inference_steps=3,
        initial_audio_waveforms=embeddings(1, 2, 24, seed=9),
        initial_audio_sampling_rate=4,
        generator=generator(),
    ).audios
    return tensors(audios)


# ---- Stable Diffusion ----

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


STABLE_DIFFUSION_COMPONENTS = ("text_encoder", "unet", "vae")

ENTRIES = (
    PipelineEntry(
        "stable-audio",
        "audio",
        build_stable_audio,
        run_stable_audio,
        ("text_encoder", "projection_model", "transformer", "vae"),
    ),
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
)
