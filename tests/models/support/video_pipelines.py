"""Tiny pipelines that make videos: from text, from images, with two transformers, and with sound."""

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
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from pipeline_entry import PipelineEntry
from pipeline_parts import PROMPT, embeddings, generator, image, seeded, t5_text_encoder, tensors, tokenizer, wan_vae
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

TRANSFORMER_AND_VAE = ("transformer", "vae")
STEPS = {"num_inference_steps": 2, "output_type": "pt"}
WITHOUT_TEXT_ENCODER = {"text_encoder": None, "tokenizer": None}


# ---- Wan ----


def wan_transformer(in_channels: int = 16, seed: int = 0, **config: Any) -> WanTransformer3DModel:
    return seeded(
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=16,
            text_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
            **config,
        ),
        seed,
    )


def wan_parts(**changes: Any) -> dict[str, Any]:
    return {
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": wan_transformer(),
        "vae": wan_vae(16),
        **WITHOUT_TEXT_ENCODER,
        **changes,
    }


def wan_call(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call for 5 frames of 16 by 32 pixels."""
    return {
        "prompt_embeds": embeddings(1, 7, 32),
        "negative_prompt_embeds": embeddings(1, 7, 32, seed=4),
        "guidance_scale": 4.0,
        "height": 16,
        "width": 32,
        "num_frames": 5,
        "generator": generator(),
        **STEPS,
        **arguments,
    }


def run_wan(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**wan_call()).frames)


def build_wan_with_text_encoder() -> WanPipeline:
    return WanPipeline(**wan_parts(text_encoder=t5_text_encoder(32), tokenizer=tokenizer()))


def run_wan_prompt(pipe: Any) -> list[torch.Tensor]:
    prompts = {"prompt": PROMPT, "prompt_embeds": None, "negative_prompt_embeds": None}
    return tensors(pipe(**wan_call(**prompts, max_sequence_length=8)).frames)


def build_wan_22() -> WanPipeline:
    """Return Wan 2.2, of whose transformers the first works on noise above the boundary."""
    return WanPipeline(**wan_parts(transformer_2=wan_transformer(seed=1)), boundary_ratio=0.9)


def run_wan_22(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**wan_call(guidance_scale_2=3.0, num_inference_steps=3)).frames)


def build_wan_tiled() -> WanPipeline:
    pipe = WanPipeline(**wan_parts())
    pipe.vae.enable_tiling(
        tile_sample_min_height=16, tile_sample_min_width=16, tile_sample_stride_height=8, tile_sample_stride_width=8
    )
    return pipe


def run_wan_tiled(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**wan_call(height=32)).frames)


def build_wan_image_to_video() -> WanImageToVideoPipeline:
    """Return the pipeline of Wan 2.1, whose transformer reads an image's embedding beside its latents."""
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    return WanImageToVideoPipeline(
        image_encoder=seeded(CLIPVisionModel(config)),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        **wan_parts(transformer=wan_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24)),
    )


def run_wan_image_to_video(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**wan_call(image=image(32, 16))).frames)


def build_wan_22_image_to_video() -> WanImageToVideoPipeline:
    """Return the pipeline of Wan 2.2, without an image encoder and with two transformers."""
    transformers = {f"transformer{suffix}": wan_transformer(36, seed) for seed, suffix in enumerate(("", "_2"))}
    return WanImageToVideoPipeline(**wan_parts(**transformers), boundary_ratio=0.9)


def run_wan_22_image_to_video(pipe: Any) -> list[torch.Tensor]:
    arguments = wan_call(image=image(32, 16), last_image=image(32, 16, seed=8), num_inference_steps=3)
    return tensors(pipe(**arguments).frames)


WAN_ENTRIES = (
    PipelineEntry("wan", "text-to-video", lambda: WanPipeline(**wan_parts()), run_wan, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "wan-prompt",
        "text-encoder",
        build_wan_with_text_encoder,
        run_wan_prompt,
        ("text_encoder", "transformer", "vae"),
    ),
    PipelineEntry("wan-22", "two-transformers", build_wan_22, run_wan_22, ("transformer", "transformer_2", "vae")),
    PipelineEntry("wan-tiled-vae", "tiled-vae", build_wan_tiled, run_wan_tiled, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "wan-image-to-video",
        "image-to-video",
        build_wan_image_to_video,
        run_wan_image_to_video,
        ("image_encoder", "transformer", "vae"),
    ),
    PipelineEntry(
        "wan-22-image-to-video",
        "image-to-video",
        build_wan_22_image_to_video,
        run_wan_22_image_to_video,
        ("transformer", "transformer_2", "vae"),
    ),
)


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
    *WAN_ENTRIES,
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
