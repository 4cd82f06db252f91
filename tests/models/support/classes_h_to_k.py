"""Entries of the classes from HiDream to Krea."""

from __future__ import annotations

import torch
from class_entry import ClassEntry, Random
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)
from sequence_arguments import grid_ids, padding_mask, timestep


def _hidream_image(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 4, 8),
        "timesteps": timestep(749.5, 2),
        "encoder_hidden_states_t5": random.normal(2, 5, 16),
        "encoder_hidden_states_llama3": random.normal(4, 2, 6, 24),
        "pooled_embeds": random.normal(2, 12),
        "attention_kwargs": None,
    }


def _hunyuan_dit(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 8, 8),
        "timestep": torch.tensor([621.0, 621.0]),
        "encoder_hidden_states": random.normal(2, 5, 16),
        "text_embedding_mask": padding_mask((3, 5), 5, torch.int64),
        "encoder_hidden_states_t5": random.normal(2, 6, 24),
        "text_embedding_mask_t5": padding_mask((6, 4), 6, torch.int64),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(2, 1),
        "style": torch.tensor([0]).repeat(2),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (32, 32)), (4, 4), output_type="pt"),
    }


def _hunyuan_image(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 8, 3, 4),
        "timestep": timestep(875.0, 2),
        "timestep_r": timestep(750.0, 2),
        "guidance": torch.tensor([3.25, 3.25]) * 1000.0,
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_attention_mask": padding_mask((6, 4), 6, torch.int64),
        "encoder_hidden_states_2": random.normal(2, 5, 12),
        "encoder_attention_mask_2": padding_mask((0, 3), 5, torch.int64),  # a prompt without quoted text has no glyphs
        "attention_kwargs": {},
    }


def _hunyuan_video_15(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 9, 2, 3, 4),
        "timestep": timestep(875.0, 2),
        "timestep_r": timestep(750.0, 2),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_attention_mask": padding_mask((6, 4), 6, torch.float32),
        "encoder_hidden_states_2": random.normal(2, 5, 12),
        "encoder_attention_mask_2": padding_mask((0, 3), 5, torch.float32),
        "image_embeds": random.normal(2, 4, 20),
        "attention_kwargs": None,
    }


def _hunyuan_video_framepack(random: Random) -> dict[str, object]:
    sizes = {"prefix": 1, "padding": 3, "latents": 3, "history_1x": 1, "history_2x": 2, "history_4x": 16}
    indices = dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
    return {
        "hidden_states": random.normal(1, 4, 3, 8, 8),
        "timestep": timestep(875.0),
        "encoder_hidden_states": random.normal(1, 6, 16),
        "encoder_attention_mask": padding_mask((4,), 6, torch.float32),
        "pooled_projections": random.normal(1, 12),
        "image_embeds": random.normal(1, 5, 20),
        "indices_latents": indices["latents"],
        "guidance": torch.tensor([9.0]) * 1000.0,
        "latents_clean": random.normal(1, 4, 2, 8, 8),
        "indices_latents_clean": torch.cat([indices["prefix"], indices["history_1x"]]),
        "latents_history_2x": random.normal(1, 4, 2, 8, 8),
        "indices_latents_history_2x": indices["history_2x"],
        "latents_history_4x": random.normal(1, 4, 16, 8, 8),
        "indices_latents_history_4x": indices["history_4x"],
        "attention_kwargs": None,
    }


def _hunyuan_video(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 2, 4, 6),
        "timestep": timestep(875.0, 2),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_attention_mask": padding_mask((6, 4), 6, torch.float32),
        "pooled_projections": random.normal(2, 12),
        "guidance": torch.tensor([6.0, 6.0]) * 1000.0,
        "attention_kwargs": None,
    }


def _ideogram(random: Random) -> dict[str, object]:
    text_lengths, text_width, height, width = (5, 3), 5, 2, 3
    image_tokens = height * width
    tokens = text_width + image_tokens
    # Text is padded on the left, so that text and image are one run of tokens.
    is_text = padding_mask(text_lengths, text_width).flip(1)
    position_ids = torch.zeros(2, tokens, 3, dtype=torch.int64)
    for sample, length in enumerate(text_lengths):
        position_ids[sample, text_width - length : text_width] = torch.arange(length).unsqueeze(1)
    position_ids[:, text_width:] = grid_ids(height, width).long() + IMAGE_POSITION_OFFSET
    indicator = torch.full((2, tokens), OUTPUT_IMAGE_INDICATOR)
    indicator[:, :text_width] = LLM_TOKEN_INDICATOR * is_text
    segment_ids = torch.ones(2, tokens, dtype=torch.int64)
    segment_ids[:, :text_width][~is_text] = SEQUENCE_PADDING_INDICATOR
    text = random.normal(2, text_width, 24) * is_text.unsqueeze(2)
    return {
        "hidden_states": torch.cat([torch.zeros(2, text_width, 8), random.normal(2, image_tokens, 8)], dim=1),
        "timestep": timestep(0.25, 2),
        "encoder_hidden_states": torch.cat([text, torch.zeros(2, image_tokens, 24)], dim=1),
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "indicator": indicator,
        "attention_kwargs": None,
    }


def _joy_image_edit_plus(random: Random) -> dict[str, object]:
    patches = random.normal(2, 14, 4, 1, 2, 2)
    patches[1, 10:] = 0.0
    return {
        "hidden_states": patches,
        "timestep": torch.tensor(875.0).repeat(2),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_hidden_states_mask": padding_mask((6, 4), 6, torch.int64),
        "shape_list": [[(1, 2, 3), (1, 2, 4)], [(1, 2, 3), (1, 2, 2)]],  # the image and its reference, in patches
    }


def _joy_image_edit(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 2, 4, 1, 4, 6),
        "timestep": torch.tensor(875.0).repeat(1),
        "encoder_hidden_states": random.normal(1, 6, 16),
    }


def _kandinsky_5(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 2, 4, 6, 9),
        "encoder_hidden_states": random.normal(1, 6, 16),
        "pooled_projections": random.normal(1, 12),
        "timestep": torch.tensor([875.0]),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(3)],
        "text_rope_pos": torch.arange(6),
        "scale_factor": (1, 2, 2),
        "sparse_params": None,
    }


def _kandinsky_6_sr(random: Random) -> dict[str, object]:
    # Latents, then an anchor and its mask, both zero.
    return {
        "hidden_states": torch.cat([random.normal(2, 2, 8, 16, 4), torch.zeros(2, 2, 8, 16, 5)], dim=-1),
        "timestep": timestep(875.0, 2),
    }


def _kandinsky_6(random: Random) -> dict[str, object]:
    # Two frames and the reference image behind them, at the first frame's position.
    mask = torch.zeros(2, 3, 4, 6, 1)
    mask[:, -1] = 1
    token_types = torch.zeros(2, 3, dtype=torch.int64)
    token_types[:, -1] = 1
    return {
        "hidden_states": torch.cat([random.normal(2, 3, 4, 6, 4), torch.zeros(2, 3, 4, 6, 4), mask], dim=-1),
        "audio_hidden_states": random.normal(2, 7, 6),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "pooled_projections": random.normal(2, 12),
        "timestep": timestep(875.0, 2),
        "visual_rope_pos": (torch.tensor([0, 1, 0]), torch.arange(2), torch.arange(3)),
        "encoder_attention_mask": padding_mask((6, 4), 6),
        "visual_token_type_ids": token_types,
    }


def _krea(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 6, 8),
        "encoder_hidden_states": random.normal(2, 5, 3, 24),
        "timestep": timestep(0.875, 2),
        "position_ids": torch.cat([torch.zeros(5, 3), grid_ids(2, 3)]),
        "encoder_attention_mask": padding_mask((5, 3), 5),
        "attention_kwargs": None,
    }


_JOY_IMAGE_CONFIG = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [8, 4, 4],
}
_HUNYUAN_VIDEO_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 16,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (8, 4, 4),
}

ENTRIES = (
    ClassEntry(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [16, 24],
            "text_emb_dim": 12,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 3],
        },
        _hidream_image,
    ),
    ClassEntry(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 6,  # the last two have a skip connection
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 12,
            "text_len": 5,
            "text_len_t5": 6,
        },
        _hunyuan_dit,
    ),
    ClassEntry(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "text_embed_2_dim": 12,
            "rope_axes_dim": (8, 8),
            "use_meanflow": True,
        },
        _hunyuan_image,
    ),
    ClassEntry(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 16,
            "text_embed_2_dim": 12,
            "image_embed_dim": 20,
            "rope_axes_dim": (8, 4, 4),
            "use_meanflow": True,
        },
        _hunyuan_video_15,
    ),
    ClassEntry(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_HUNYUAN_VIDEO_CONFIG,
            "has_image_proj": True,
            "image_proj_dim": 20,
            "has_clean_x_embedder": True,
        },
        _hunyuan_video_framepack,
    ),
    ClassEntry("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO_CONFIG, _hunyuan_video),
    ClassEntry(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        _ideogram,
    ),
    ClassEntry("JoyImageEditPlusTransformer3DModel", _JOY_IMAGE_CONFIG, _joy_image_edit_plus),
    ClassEntry("JoyImageEditTransformer3DModel", _JOY_IMAGE_CONFIG, _joy_image_edit),
    ClassEntry(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 16,
            "in_text_dim2": 12,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_visual_blocks": 2,
            "axes_dims": (8, 4, 4),
            "visual_cond": True,
        },
        _kandinsky_5,
    ),
    ClassEntry(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_visual_blocks": 2,
            "axes_dims": (8, 4, 4),
            "nabla_window": (1, 1, 1),
        },
        _kandinsky_6_sr,
    ),
    ClassEntry(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 12,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 2,
            "num_visual_blocks": 2,
            "axes_dims": (8, 4, 4),
            "in_audio_dim": 6,
            "out_audio_dim": 6,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
            "visual_token_type_num_embeddings": 2,
        },
        _kandinsky_6,
    ),
    ClassEntry(
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 24,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 40,
            "axes_dims_rope": (8, 4, 4),
        },
        _krea,
    ),
)
