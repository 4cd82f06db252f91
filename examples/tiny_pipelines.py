"""Pipelines of diffusers with tiny random weights, for the examples' ``--tiny``: no file is needed.

Each function returns a pipeline without text encoders, and the arguments of a call, with random embeddings in place
of a prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

WITHOUT_TEXT_ENCODER: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


def flux1() -> tuple[FluxPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        vae=AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            shift_factor=0.1,
        ),
        text_encoder_2=None,
        tokenizer_2=None,
        **WITHOUT_TEXT_ENCODER,
    )
    text = {"prompt_embeds": torch.randn(1, 16, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipe, {"height": 64, "width": 64, "num_inference_steps": 4, **text}


def qwen_image_edit() -> tuple[QwenImageEditPlusPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    # The pipeline resizes its images to a million pixels, which is too much for a CPU.
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 64 * 64
    pipe = QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=12,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        processor=None,
        **WITHOUT_TEXT_ENCODER,
    )
    text = {
        "prompt_embeds": torch.randn(1, 12, 16),
        "prompt_embeds_mask": torch.ones(1, 12, dtype=torch.int64),
        "negative_prompt_embeds": torch.randn(1, 5, 16),
        "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.int64),
    }
    return pipe, {"height": 64, "width": 64, "num_inference_steps": 4, **text}


def wan22() -> tuple[WanPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    first, second = (
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        for _ in range(2)
    )
    pipe = WanPipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=first,
        transformer_2=second,
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        boundary_ratio=0.875,
        **WITHOUT_TEXT_ENCODER,
    )
    text = {"prompt_embeds": torch.randn(1, 12, 32), "negative_prompt_embeds": torch.randn(1, 12, 32)}
    return pipe, {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, **text}


def ltx2() -> tuple[LTX2Pipeline, dict[str, Any]]:
    torch.manual_seed(0)
    rope = {"rope_type": "split", "rope_double_precision": False}
    connectors = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    sides = {"spatio_temporal_scaling": (True,), "patch_size": 1, "patch_size_t": 1, "layers_per_block": (1,)}
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=LTX2VideoTransformer3DModel(
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
            perturbed_attn=True,
            **rope,
        ),
        connectors=LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32, **connectors, **rope
        ),
        vae=AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            downsample_type=("spatial",),
            decoder_block_out_channels=(8,),
            decoder_layers_per_block=(1, 1),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            upsample_residual=(False,),
            upsample_factor=(1,),
            **sides,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ),
        vocoder=LTX2Vocoder(
            in_channels=16,
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
        **WITHOUT_TEXT_ENCODER,
    )
    for module in (pipe.transformer, pipe.connectors, pipe.vae, pipe.audio_vae, pipe.vocoder):
        for parameter in module.parameters():  # some are made without values
            torch.nn.init.normal_(parameter, std=0.1)
    text = {
        f"{kind}prompt_{name}": tensor
        for kind in ("", "negative_")
        for name, tensor in {
            "embeds": torch.randn(1, 12, 48),
            "attention_mask": torch.ones(1, 12, dtype=torch.int64),
        }.items()
    }
    sizes = {"height": 32, "width": 32, "num_frames": 9, "frame_rate": 24.0, "num_inference_steps": 4}
    return pipe, {**sizes, "spatio_temporal_guidance_blocks": [1], **text}
