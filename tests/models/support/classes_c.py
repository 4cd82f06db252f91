"""Entries of the classes from Chroma to Cosmos."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import ClassEntry, Random
from model_arguments import flux_image_ids, padding_mask, timestep, video_rotary


def _chroma(random: Random) -> dict[str, Any]:
    # The pipeline joins a float mask for the prompt and a boolean one for the image: the result is float.
    mask = torch.cat([padding_mask((5, 7), 7, torch.float32), torch.ones(2, 16, dtype=torch.bool)], dim=1)
    return {
        "hidden_states": random.normal(2, 16, 16),
        "timestep": timestep(500.0) / 1000,
        "encoder_hidden_states": random.normal(2, 7, 16),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": flux_image_ids(4, 4),
        "attention_mask": mask,
        "joint_attention_kwargs": {},
    }


def _chrono_edit(random: Random) -> dict[str, Any]:
    """The last steps, which keep the first and the last frame; the class has 512 text tokens in its code."""
    return {
        "hidden_states": random.normal(2, 12, 2, 8, 8),
        "timestep": timestep(500, dtype=torch.int64),
        "encoder_hidden_states": random.normal(2, 512, 16),
        "encoder_hidden_states_image": random.normal(2, 5, 8),
        "attention_kwargs": None,
    }


def _cog_video_x(random: Random) -> dict[str, Any]:
    """Version 1.5, image to video: two frames a patch."""
    return {
        "hidden_states": random.normal(2, 4, 8, 8, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "timestep": timestep(500, dtype=torch.int64),
        "ofs": torch.full((1,), 2.0),
        "image_rotary_emb": video_rotary(16, 2, 4, 4),
        "attention_kwargs": None,
    }


def _cog_video_x_absolute(random: Random) -> dict[str, Any]:
    """The first version's smaller model: absolute positions."""
    return {
        "hidden_states": random.normal(2, 2, 4, 8, 8),
        "encoder_hidden_states": random.normal(2, 8, 16),
        "timestep": timestep(500, dtype=torch.int64),
        "image_rotary_emb": None,
        "attention_kwargs": None,
    }


def _cog_view(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 4, 8, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "timestep": timestep(500, dtype=torch.int64),
        "original_size": torch.tensor([[64.0, 64.0]]).repeat(2, 1),
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(2, 1),
        "crop_coords": torch.zeros(2, 2),
    }


def _consis_id(random: Random) -> dict[str, Any]:
    """One face for both halves of the guidance."""
    return {
        "hidden_states": random.normal(2, 2, 8, 8, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "timestep": timestep(500, dtype=torch.int64),
        "image_rotary_emb": video_rotary(16, 2, 4, 4),
        "attention_kwargs": None,
        "id_vit_hidden": [random.normal(1, 5, 16) for _ in range(2)],
        "id_cond": random.normal(1, 12),
    }


def _cosmos_3(random: Random) -> dict[str, Any]:
    """A packed sequence of 7 text, 3 * 2 * 3 vision, 4 sound and 4 action tokens; the first frame is given."""
    text, vision, sound, action = 7, 18, 4, 4
    starts = text, text + vision, text + vision + sound
    time = torch.cat([torch.arange(3).repeat_interleave(6), torch.arange(4), torch.arange(1, 5)]) + text + 15000
    rows = torch.cat([torch.arange(2).repeat_interleave(3).repeat(3), torch.zeros(8)])
    columns = torch.cat([torch.arange(3).repeat(6), torch.zeros(8)])
    return {
        "input_ids": random.integers(0, 32, text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, -1), torch.stack([time, rows, columns])], dim=1),
        "und_len": text,
        "sequence_length": text + vision + sound + action,
        "vision_tokens": [random.normal(1, 4, 3, 4, 6)],
        "vision_token_shapes": [(3, 2, 3)],
        "vision_sequence_indexes": torch.arange(starts[0], starts[1]),
        "vision_mse_loss_indexes": torch.arange(starts[0] + 6, starts[1]),
        "vision_timesteps": torch.full((12,), 500),
        "vision_noisy_frame_indexes": [torch.tensor([1, 2])],
        "sound_tokens": [random.normal(5, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": torch.arange(starts[1], starts[2]),
        "sound_mse_loss_indexes": torch.arange(starts[1], starts[2]),
        "sound_timesteps": torch.full((sound,), 500),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
        "action_tokens": [random.normal(action, 3)],
        "action_token_shapes": [(action, 1, 1)],
        "action_sequence_indexes": torch.arange(starts[2], starts[2] + action),
        "action_mse_loss_indexes": torch.arange(starts[2] + 1, starts[2] + action),
        "action_timesteps": torch.full((action - 1,), 500),
        "action_noisy_frame_indexes": [torch.arange(1, action)],
        "action_domain_ids": [torch.tensor([2])],
    }


def _cosmos_condition() -> torch.Tensor:
    """Return the indicator of the given frames: the first of three."""
    return torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).repeat(2, 1, 1, 1, 1)


def _cosmos(random: Random) -> dict[str, Any]:
    """Version 1, video to world."""
    return {
        "hidden_states": random.normal(2, 4, 3, 8, 8),
        "timestep": timestep(0.3),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "fps": 30,
        "condition_mask": _cosmos_condition().repeat(1, 1, 1, 8, 8),
        "padding_mask": torch.zeros(1, 1, 64, 64),
    }


def _cosmos_transfer(random: Random) -> dict[str, Any]:
    """Version 2.5 with a ControlNet: a step for each frame, and a pair of text and image contexts."""
    return {
        "hidden_states": random.normal(2, 4, 3, 8, 8),
        "timestep": (1 - _cosmos_condition()) * 0.5,
        "encoder_hidden_states": (random.normal(2, 7, 24), random.normal(2, 3, 6)),
        "block_controlnet_hidden_states": [random.normal(2, 48, 32)],
        "condition_mask": _cosmos_condition().expand(-1, -1, -1, 8, 8),
        "padding_mask": torch.zeros(1, 1, 64, 64),
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_COG_VIEW = _HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "pos_embed_max_size": 16,
    "sample_size": 8,
}
_COG_VIDEO_X = _HEADS | {
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "sample_width": 8,
    "sample_height": 8,
    "max_text_seq_length": 8,
}
_COSMOS = _HEADS | {
    "in_channels": 5,
    "out_channels": 4,
    "text_embed_dim": 16,
    "adaln_lora_dim": 8,
    "max_size": (8, 16, 16),
    "concat_padding_mask": False,  # checkpoints have it, but then the class needs torchvision, which nothing else does
}

ENTRIES = (
    ClassEntry(
        "ChromaTransformer2DModel",
        _HEADS
        | {
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 32,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        _chroma,
    ),
    ClassEntry(
        "ChronoEditTransformer3DModel",
        _HEADS
        | {
            "in_channels": 12,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 48,
            "image_dim": 8,
            "added_kv_proj_dim": 32,
            "rope_max_seq_len": 32,
        },
        _chrono_edit,
    ),
    ClassEntry(
        "CogVideoXTransformer3DModel",
        _COG_VIDEO_X
        | {
            "in_channels": 8,
            "ofs_embed_dim": 16,
            "patch_size_t": 2,
            "sample_frames": 13,
            "use_rotary_positional_embeddings": True,
            "patch_bias": False,
        },
        _cog_video_x,
    ),
    ClassEntry(
        "CogVideoXTransformer3DModel",
        _COG_VIDEO_X | {"in_channels": 4, "sample_frames": 5},
        _cog_video_x_absolute,
        "absolute_positions",
    ),
    ClassEntry("CogView3PlusTransformer2DModel", _COG_VIEW, _cog_view),
    ClassEntry(
        "CogView4Transformer2DModel",
        _COG_VIEW | {"rope_axes_dim": (16, 16)},
        lambda random: _cog_view(random) | {"timestep": timestep(500.0), "attention_kwargs": None},
    ),
    ClassEntry(
        "ConsisIDTransformer3DModel",
        _COG_VIDEO_X
        | {
            "num_layers": 4,  # a layer for the face follows every second one
            "in_channels": 8,
            "sample_frames": 5,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 12,
            "LFE_vit_dim": 16,
            "LFE_depth": 4,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 21,
            "LFE_num_scale": 2,
        },
        _consis_id,
    ),
    ClassEntry(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 64,
            "intermediate_size": 96,
            "latent_channel": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "patch_latent_dim": 16,
            "action_dim": 3,
            "action_gen": True,
            "num_embodiment_domains": 4,
            "sound_dim": 5,
            "sound_gen": True,
            "vocab_size": 32,
            "rope_axes_dim": (4, 2, 2),
        },
        _cosmos_3,
    ),
    ClassEntry("CosmosTransformer3DModel", _COSMOS, _cosmos),
    ClassEntry(
        "CosmosTransformer3DModel",
        _COSMOS
        | {
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 24,
            "encoder_hidden_states_channels": 16,
            "controlnet_block_every_n": 2,
            "img_context_dim_in": 6,
            "img_context_num_tokens": 3,
            "img_context_dim_out": 32,
        },
        _cosmos_transfer,
        "transfer",
    ),
)
