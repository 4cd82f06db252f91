"""Tiny pipelines of Wan: from text and images, with one transformer and two, with a LoRA, and VACE."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import Random
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from pipeline_entry import PipelineEntry
from pipeline_parts import (
    PROMPT,
    STEPS,
    TRANSFORMER_AND_VAE,
    WITHOUT_TEXT_ENCODER,
    embeddings,
    generator,
    image,
    seeded,
    t5_text_encoder,
    tensors,
    tokenizer,
    wan_vae,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel


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


def build_wan_lora() -> WanPipeline:
    pipe = WanPipeline(**wan_parts())
    random = Random(35)
    weights = {}
    for block in range(2):
        for projection in ("attn1.to_q", "attn2.to_k"):
            layer = f"transformer.blocks.{block}.{projection}"
            weights[f"{layer}.lora_A.weight"] = random.normal(2, 24) / 24**0.5
            weights[f"{layer}.lora_B.weight"] = random.normal(24, 2) / 2**0.5
    pipe.load_lora_weights(weights, adapter_name="motion")
    return pipe


def run_wan_lora(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**wan_call(attention_kwargs={"scale": 0.7})).frames)


def build_wan_vace() -> WanVACEPipeline:
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=96,
    )
    return WanVACEPipeline(**wan_parts(transformer=seeded(transformer)))


def run_wan_vace(pipe: Any) -> list[torch.Tensor]:
    """Continue a video and look like a reference, whose frames lead those of the result."""
    arguments = wan_call(
        video=[image(32, 16, seed) for seed in range(5)],
        mask=[image(32, 16, 20 + seed).convert("L") for seed in range(5)],
        reference_images=[image(32, 16, seed=8)],
        conditioning_scale=0.7,
    )
    return tensors(pipe(**arguments).frames)


ENTRIES = (
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
    PipelineEntry("wan-lora", "lora", build_wan_lora, run_wan_lora, TRANSFORMER_AND_VAE),
    PipelineEntry("wan-vace", "edit", build_wan_vace, run_wan_vace, TRANSFORMER_AND_VAE),
)
