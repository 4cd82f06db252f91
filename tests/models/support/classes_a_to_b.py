"""Entries of the classes from ACE-Step to Bria."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import ClassEntry, Random
from diffusers import AnyFlowFARTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from model_arguments import flux_image_ids, padding_mask, timestep


def _ace_step(random: Random) -> dict[str, Any]:
    step = torch.full((2,), 0.4)
    inside = padding_mask((24, 18), 24, torch.float32)[..., None].expand(-1, -1, 8)
    return {
        "hidden_states": random.normal(2, 24, 8),
        "timestep": step,
        "timestep_r": step,
        "encoder_hidden_states": random.normal(2, 7, 16),
        "context_latents": torch.cat([random.normal(2, 24, 8), inside], dim=-1),
        "attention_kwargs": None,
    }


def _allegro(random: Random) -> dict[str, Any]:
    frames, height, width = 2, 4, 4
    *frequencies, time_grid, row_grid, column_grid = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (height, width)), (height, width), frames, interpolation_scale=(2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(time_grid.long(), row_grid.long(), column_grid.long())
    return {
        "hidden_states": random.normal(2, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": random.normal(2, 1, 7, 16),
        "timestep": timestep(500.0),
        "encoder_attention_mask": padding_mask((7, 4), 7, torch.int64),
        "image_rotary_emb": (tuple(frequencies), tuple(positions.T.reshape(3, 1, -1).contiguous())),
    }


_ANY_FLOW = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
# With a limit of two, the first of three chunks is read from the compressed cache.
_ANY_FLOW_FAR = _ANY_FLOW | {
    "compressed_patch_size": (1, 4, 4),
    "full_chunk_limit": 2,
    "chunk_partition": (1, 2, 2),
}


def _any_flow_timesteps(frames: int) -> dict[str, torch.Tensor]:
    """Return the steps as ``FlowMapEulerDiscreteScheduler`` makes them: float64, ``(2, frames)``."""
    return {
        "timestep": timestep(600.0, dtype=torch.float64)[:, None].repeat(1, frames),
        "r_timestep": timestep(350.0, dtype=torch.float64)[:, None].repeat(1, frames),
    }


def _any_flow(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 3, 4, 8, 8),
        **_any_flow_timesteps(3),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "attention_kwargs": None,
    }


def _any_flow_cache(random: Random) -> dict[int, dict[str, torch.Tensor]]:
    """Return the pipeline's cache of keys and values for all chunks of 16 full or 4 compressed tokens a frame."""
    return {
        layer: {
            "full_cache": random.normal(2, 2, 2, 2 * 2 * 16, 16),
            "compressed_cache": random.normal(2, 2, 2, 2 * 2 * 4, 16),
        }
        for layer in range(2)
    }


def _any_flow_far(random: Random) -> dict[str, Any]:
    """The third chunk of two frames, which reads the first two chunks from the cache."""
    return {
        "hidden_states": random.normal(2, 2, 4, 8, 8),
        **_any_flow_timesteps(2),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "attention_kwargs": None,
        "chunk_partition": [1, 2, 2],
        "kv_cache": _any_flow_cache(random),
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def _any_flow_far_write(random: Random) -> dict[str, Any]:
    """All three chunks, whose keys and values the model writes to the cache; it gives no sample."""
    chunks = [1, 2, 2]
    mask_builder = AnyFlowFARTransformer3DModel.from_config(dict(_ANY_FLOW_FAR))
    return {
        "hidden_states": random.normal(2, 5, 4, 8, 8),
        "chunk_partition": chunks,
        "timestep": timestep(0, dtype=torch.int64)[:, None].repeat(1, 5),
        "r_timestep": timestep(0, dtype=torch.int64)[:, None].repeat(1, 5),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "attention_mask": mask_builder.build_attention_mask(
            chunk_partition=chunks, height=8, width=8, device=torch.device("cpu"), mode="cache"
        ),
        "attention_kwargs": None,
        "kv_cache": _any_flow_cache(random),
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": True},
    }


def _aura_flow(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 4, 8, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "timestep": timestep(0.5),
        "attention_kwargs": None,
    }


def _bria_fibo_2(random: Random) -> dict[str, Any]:
    """Two prompts of unlike length, thus with unlike numbers of gist tokens, and one image to edit."""
    return {
        "hidden_states": random.normal(2, 4, 8, 8),
        "timestep": timestep(500.0) / 1000,
        "encoder_hidden_states": random.normal(2, 3, 8, 16),
        "encoder_attention_mask": padding_mask((8, 4), 8),
        "context_latents": [random.normal(2, 4, 4, 8)],
    }


def _bria(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 16, 16),
        "timestep": timestep(500.0),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": flux_image_ids(4, 4),
    }


def _bria_fibo(random: Random) -> dict[str, Any]:
    mask = torch.cat([padding_mask((5, 7), 7), torch.ones(2, 16, dtype=torch.bool)], dim=1)
    return _bria(random) | {
        "text_encoder_layers": [random.normal(2, 7, 8) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
    }


_BRIA = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": [4, 6, 6],
}

ENTRIES = (
    ClassEntry(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 4,
            "encoder_hidden_size": 16,
        },
        _ace_step,
    ),
    ClassEntry(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 16,
        },
        _allegro,
    ),
    ClassEntry("AnyFlowFARTransformer3DModel", _ANY_FLOW_FAR, _any_flow_far),
    ClassEntry("AnyFlowFARTransformer3DModel", _ANY_FLOW_FAR, _any_flow_far_write, "kv_write"),
    ClassEntry("AnyFlowTransformer3DModel", _ANY_FLOW, _any_flow),
    ClassEntry(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        _aura_flow,
    ),
    ClassEntry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 2,
            "gist_max_text_len": 10,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 32, 32),
        },
        _bria_fibo_2,
    ),
    ClassEntry("BriaFiboTransformer2DModel", _BRIA | {"text_encoder_dim": 8}, _bria_fibo),
    ClassEntry("BriaTransformer2DModel", _BRIA, lambda random: _bria(random) | {"attention_kwargs": None}),
)
