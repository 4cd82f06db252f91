"""Tiny pipelines that make videos, some with sound: those of other families than Wan."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from pipeline_entry import PipelineEntry
from pipeline_parts import (
    STEPS,
    TRANSFORMER_AND_VAE,
    WITHOUT_TEXT_ENCODER,
    embeddings,
    generator,
    image,
    seeded,
    tensors,
)
from wan_pipelines import wan_call

# ---- CogVideoX ----


def build_cogvideox() -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return CogVideoXPipeline(
        scheduler=CogVideoXDDIMScheduler(),
        transformer=seeded(transformer),
        vae=seeded(vae),
        **WITHOUT_TEXT_ENCODER,
    )


def run_cogvideox(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**wan_call(width=16, use_dynamic_cfg=True)).frames)


# ---- HunyuanVideo ----


def build_hunyuan_video() -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=seeded(transformer),
        vae=seeded(vae),
        text_encoder_2=None,
        tokenizer_2=None,
        **WITHOUT_TEXT_ENCODER,
    )


def run_hunyuan_video(pipe: Any) -> list[torch.Tensor]:
    frames = pipe(
        prompt_embeds=embeddings(1, 7, 16),
        prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        pooled_prompt_embeds=embeddings(1, 8, seed=3),
        guidance_scale=4.5,
        height=16,
        width=16,
        num_frames=5,
        generator=generator(),
        **STEPS,
    ).frames
    return tensors(frames)


# ---- LTX-Video and LTX-2 ----


def ltx_parts() -> dict[str, Any]:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=True,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "transformer": seeded(transformer),
        "vae": seeded(vae),
        **WITHOUT_TEXT_ENCODER,
    }


def ltx_call(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call for 9 frames of 32 by 32 pixels, whose VAE is told of a timestep."""
    masks = {
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]),
        "decode_timestep": 0.05,
        "decode_noise_scale": 0.025,
    }
    return wan_call(height=32, num_frames=9, guidance_scale=3.0, **masks, **arguments)


def run_ltx(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**ltx_call()).frames)


def run_ltx_image_to_video(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**ltx_call(image=image(32, 32))).frames)


def ltx2_vae() -> AutoencoderKLLTX2Video:
    return seeded(
        AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
    )


def ltx2_sound_parts() -> dict[str, Any]:
    """Return the decoder of spectrograms, and the vocoder that makes waves of them."""
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return {"audio_vae": seeded(audio_vae), "vocoder": seeded(vocoder)}


def build_ltx2() -> LTX2Pipeline:
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_type="split",
        rope_double_precision=False,
        perturbed_attn=True,
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=seeded(transformer),
        connectors=seeded(connectors),
        vae=ltx2_vae(),
        **ltx2_sound_parts(),
        **WITHOUT_TEXT_ENCODER,
    )


def run_ltx2(pipe: Any) -> list[torch.Tensor]:
    """Return the frames and the waves of a call with every kind of guidance: four transformer calls a step."""
    masks = {f"{kind}prompt_attention_mask": torch.ones(1, 7, dtype=torch.int64) for kind in ("", "negative_")}
    arguments = wan_call(
        height=32,
        prompt_embeds=embeddings(1, 7, 48),
        negative_prompt_embeds=embeddings(1, 7, 48, seed=4),
        spatio_temporal_guidance_blocks=[1],
        frame_rate=25.0,
        **masks,
    )
    results = pipe(**arguments)
    return tensors([results.frames, results.audio])


ENTRIES = (
    PipelineEntry("cogvideox", "text-to-video", build_cogvideox, run_cogvideox, TRANSFORMER_AND_VAE),
    PipelineEntry("hunyuan-video", "text-to-video", build_hunyuan_video, run_hunyuan_video, TRANSFORMER_AND_VAE),
    PipelineEntry("ltx", "text-to-video", lambda: LTXPipeline(**ltx_parts()), run_ltx, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "ltx-image-to-video",
        "image-to-video",
        lambda: LTXImageToVideoPipeline(**ltx_parts()),
        run_ltx_image_to_video,
        TRANSFORMER_AND_VAE,
    ),
    PipelineEntry(
        "ltx2",
        "video-with-sound",
        build_ltx2,
        run_ltx2,
        ("connectors", "transformer", "vae", "audio_vae", "vocoder"),
    ),
)
