"""Entries of the classes from Stable Diffusion 3 to Stable Audio."""

from __future__ import annotations

import torch
from class_entry import ClassEntry, Random
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from sequence_arguments import padding_mask, timestep


def _rotary_table(tokens: int, dim: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines ``(tokens, dim)`` of positions from ``start`` on, each angle twice in a row."""
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(start, start + tokens).float(), frequencies).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _sd3(random: Random) -> dict[str, object]:
    """Guidance, with the residuals of a ControlNet of two blocks, each added after two blocks of the model."""
    return {
        "hidden_states": random.normal(1, 4, 8, 12).repeat(2, 1, 1, 1),
        "timestep": timestep(750.0, 2),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "pooled_projections": random.normal(2, 24),
        "block_controlnet_hidden_states": [random.normal(2, 24, 32), random.normal(2, 24, 32)],
        "joint_attention_kwargs": None,
    }


def _sd3_skip_layers(random: Random) -> dict[str, object]:
    """The third call of skip-layer guidance: the prompt's row alone."""
    return {
        "hidden_states": random.normal(1, 4, 8, 12),
        "timestep": timestep(750.0),
        "encoder_hidden_states": random.normal(1, 7, 24),
        "pooled_projections": random.normal(1, 24),
        "joint_attention_kwargs": None,
        "skip_layers": [1, 2],
    }


def _sana(random: Random) -> dict[str, object]:
    """Sana Sprint: guidance is an argument, and the timestep is that of the consistency model, from 0 to 1."""
    return {
        "hidden_states": random.normal(2, 4, 4, 6),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "encoder_attention_mask": padding_mask((7, 4), 7, torch.int64),
        "guidance": torch.full((2,), 0.45),
        "timestep": torch.full((2,), 0.6),
        "attention_kwargs": None,
    }


def _sana_controlnet(random: Random) -> dict[str, object]:
    """Guidance, with the residuals of a ControlNet of one block."""
    return {
        "hidden_states": random.normal(1, 4, 4, 6).repeat(2, 1, 1, 1),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "encoder_attention_mask": padding_mask((2, 7), 7, torch.int64),
        "timestep": timestep(600.0, 2),
        "attention_kwargs": None,
        "controlnet_block_samples": (random.normal(2, 24, 32),),
    }


def _sana_video(random: Random) -> dict[str, object]:
    """Image to video under guidance: the timestep of the first frame's tokens is 0."""
    timesteps = torch.full((2, 1, 3, 2, 3), 600.0)
    timesteps[:, :, 0] = 0
    return {
        "hidden_states": random.normal(1, 4, 3, 4, 6).repeat(2, 1, 1, 1, 1),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "encoder_attention_mask": padding_mask((2, 7), 7, torch.int64),
        "timestep": timesteps,
        "attention_kwargs": None,
    }


def _refiner_rotary(frame: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the table ``(1, tokens, width)`` of ``frames`` frames of six tokens each."""
    cosines, sines = _rotary_table(6 * frames, 32, start=6 * frame)
    return cosines[None], sines[None]


def _sana_wm_refiner(random: Random) -> dict[str, object]:
    """The last pass over frames 3 and 4: it attends to one sink frame and to frames 1 and 2, and fills the cache."""
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = _refiner_rotary(0, 1)
    for layer in cache.layer_caches:
        layer.store_sink(random.normal(1, 6, 32), random.normal(1, 6, 32))
        layer.store_history(random.normal(1, 12, 32), random.normal(1, 12, 32))
    return {
        "hidden_states": random.normal(1, 12, 8),
        "encoder_hidden_states": random.normal(1, 7, 24),
        "timestep": torch.zeros(1, 12),
        "video_rotary_emb": _refiner_rotary(3, 2),
        "encoder_attention_mask": padding_mask((5,), 7, torch.int64),
        "kv_cache": cache,
        "kv_cache_mode": "inject_and_capture_post_rope",
    }


def _camera(frames: int) -> torch.Tensor:
    """Return ``(1, frames, 20)``: the poses of a camera that turns and moves, and its focal lengths and centre."""
    angles = torch.arange(frames) * 0.1
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 0, 0] = poses[:, 2, 2] = angles.cos()
    poses[:, 0, 2], poses[:, 2, 0] = angles.sin(), -angles.sin()
    poses[:, 2, 3] = torch.arange(frames) * 0.2
    intrinsics = torch.tensor([5.0, 5.0, 3.0, 2.0]).repeat(frames, 1)
    return torch.cat([poses.flatten(1), intrinsics], dim=1)[None]


def _sana_wm(random: Random) -> dict[str, object]:
    """Guidance: the timestep is one per frame, and 0 for the first, which is given."""
    return {
        "hidden_states": random.normal(1, 8, 3, 4, 6).repeat(2, 1, 1, 1, 1),
        "timestep": torch.tensor([[[0.0, 600.0, 600.0]]] * 2),
        "encoder_hidden_states": random.normal(2, 1, 7, 24),
        "data_info": {"img_hw": torch.tensor([[128.0, 192.0]])},
        "mask": padding_mask((2, 7), 7, torch.int64),
        "camera_conditions": _camera(3).repeat(2, 1, 1),
        "chunk_plucker": random.normal(1, 48, 3, 4, 6).repeat(2, 1, 1, 1, 1),
    }


def _skyreels(random: Random) -> dict[str, object]:
    """Diffusion forcing: each frame of a block has its timestep. The class takes the frame rate of one row only."""
    return {
        "hidden_states": random.normal(1, 4, 4, 4, 6),
        "timestep": torch.tensor([[400, 400, 800, 800]]),
        "encoder_hidden_states": random.normal(1, 7, 24),
        "enable_diffusion_forcing": True,
        "fps": [1],
        "attention_kwargs": None,
    }


def _skyreels_image(random: Random) -> dict[str, object]:
    """Image to video of two prompts: in more channels the mask and latents of the first frame."""
    return {
        "hidden_states": random.normal(2, 12, 3, 4, 6),
        "timestep": timestep(700, 2, torch.int64),
        "encoder_hidden_states": random.normal(2, 512, 24),  # a fixed length in its attention to images
        "encoder_hidden_states_image": random.normal(2, 6, 40),
        "attention_kwargs": None,
    }


def _stable_audio_3(random: Random) -> dict[str, object]:
    """Inpainting: the channels of the mask and of the given sound are added in each block."""
    given = padding_mask((12, 12), 12, torch.float32)[:, None]
    given[:, :, 4:9] = 0
    return {
        "hidden_states": random.normal(2, 8, 12),
        "timestep": timestep(0.6, 2),
        "encoder_hidden_states": random.normal(2, 8, 24),
        "global_hidden_states": random.normal(2, 24),
        "encoder_attention_mask": padding_mask((8, 5), 8),
        "local_add_cond": torch.cat([given, random.normal(2, 8, 12) * given], dim=1),
    }


def _stable_audio(random: Random) -> dict[str, object]:
    """Guidance; the rotary table covers the token of the durations too."""
    cosines, sines = _rotary_table(13, 8)
    halves = torch.arange(8) // 4 + 2 * (torch.arange(8) % 4)  # all angles, and all again
    return {
        "hidden_states": random.normal(1, 8, 12).repeat(2, 1, 1),
        "timestep": torch.tensor([300.0]),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "global_hidden_states": random.normal(2, 1, 48),
        "rotary_embedding": (cosines[:, halves], sines[:, halves]),
    }


_SD3 = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "out_channels": 4,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [0, 1],
    "qk_norm": "rms_norm",
}
_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
_SKYREELS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
    "inject_sample_info": True,
    "num_frame_per_block": 2,
}

ENTRIES = (
    ClassEntry("SD3Transformer2DModel", _SD3, _sd3),
    ClassEntry("SD3Transformer2DModel", _SD3, _sd3_skip_layers, "skip_layers"),
    ClassEntry("SanaTransformer2DModel", _SANA, _sana),
    ClassEntry("SanaTransformer2DModel", {**_SANA, "guidance_embeds": False}, _sana_controlnet, "controlnet"),
    ClassEntry(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "rope_max_seq_len": 32,
        },
        _sana_video,
    ),
    ClassEntry(
        "SanaWMLTX2RefinerTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 24,
        },
        _sana_wm_refiner,
    ),
    ClassEntry(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 8,
            "num_layers": 4,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 24,
            "image_size": 128,
            "caption_channels": 24,
        },
        _sana_wm,
    ),
    ClassEntry("SkyReelsV2Transformer3DModel", _SKYREELS, _skyreels),
    ClassEntry(
        "SkyReelsV2Transformer3DModel",
        {
            **_SKYREELS,
            "in_channels": 12,
            "image_dim": 40,
            "added_kv_proj_dim": 32,
            "inject_sample_info": False,
            "num_frame_per_block": 1,
        },
        _skyreels_image,
        "image_to_video",
    ),
    ClassEntry(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 24,
            "local_add_cond_dim": 9,
            "timestep_features_dim": 32,
            "num_memory_tokens": 4,
        },
        _stable_audio_3,
    ),
    ClassEntry(
        "StableAudioDiTModel",
        {
            "sample_size": 12,
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "time_proj_dim": 32,
            "global_states_input_dim": 48,
            "cross_attention_input_dim": 24,
        },
        _stable_audio,
    ),
)
