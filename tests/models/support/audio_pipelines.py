"""Tiny pipelines that make sound: Stable Audio and ACE-Step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from pipeline_entry import PipelineEntry
from pipeline_parts import (
    NEGATIVE_PROMPT,
    PROMPT,
    embeddings,
    generator,
    seeded,
    t5_text_encoder,
    tensors,
    tokenizer,
)
from transformers import Qwen3Config, Qwen3Model

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


# ---- ACE-Step ----

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}


def build_ace_step() -> AceStepPipeline:
    """Return the pipeline without its tokenizer of sound, which only given sound needs."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, **ATTENTION}
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **sizes
    )
    condition_encoder = AceStepConditionEncoder(
        text_hidden_dim=32,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **sizes,
    )
    condition_encoder.silence_latent.copy_(embeddings(*condition_encoder.silence_latent.shape, seed=45))
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
        )
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=8,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return AceStepPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        transformer=seeded(transformer),
        condition_encoder=seeded(condition_encoder),
        text_encoder=seeded(text_encoder),
        tokenizer=tokenizer(max_length=64),
        vae=seeded(vae),
    )


def run_ace_step(pipe: Any) -> list[torch.Tensor]:
    audios = pipe(
        prompt=PROMPT,
        lyrics="a lake",
        audio_duration=6.0,
        guidance_scale=3.0,
        num_inference_steps=2,
        generator=generator(),
    ).audios
    return tensors(audios)


ENTRIES = (
    PipelineEntry(
        "stable-audio",
        "audio",
        build_stable_audio,
        run_stable_audio,
        ("text_encoder", "projection_model", "transformer", "vae"),
    ),
    PipelineEntry(
        "ace-step", "audio", build_ace_step, run_ace_step, ("text_encoder", "condition_encoder", "transformer", "vae")
    ),
)
