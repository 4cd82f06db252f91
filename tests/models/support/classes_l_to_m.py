"""Entries of the classes from Latte to Motif."""

from __future__ import annotations

import torch
from class_entry import ClassEntry, Random
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from sequence_arguments import grid_ids, padding_mask, timestep


def _ltx_2_video(random: Random) -> dict[str, object]:
    frames, height, width, audio_frames = 2, 2, 3, 7
    device = torch.device("cpu")
    rope = LTX2AudioVideoRotaryPosEmbed(dim=32, modality="video")
    audio_rope = LTX2AudioVideoRotaryPosEmbed(dim=16, modality="audio", scale_factors=[4])
    mask = torch.ones(2, 6, dtype=torch.int64)
    step = timestep(875.0, 2)
    return {
        "hidden_states": random.normal(2, frames * height * width, 8),
        "audio_hidden_states": random.normal(2, audio_frames, 6),
        "encoder_hidden_states": random.normal(2, 6, 32),
        "audio_encoder_hidden_states": random.normal(2, 6, 16),
        "timestep": step,
        "sigma": step,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": audio_frames,
        "video_coords": rope.prepare_video_coords(2, frames, height, width, device, fps=24.0),
        "audio_coords": audio_rope.prepare_audio_coords(2, audio_frames, device),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
    }


def _ltx_video(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 2 * 2 * 3, 8),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "timestep": timestep(875.0, 2),
        "encoder_attention_mask": padding_mask((6, 4), 6),
        "num_frames": 2,
        "height": 2,
        "width": 3,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
    }


def _latte(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 3, 8, 8),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "timestep": timestep(621, 2, torch.int64),
        "enable_temporal_attentions": True,
    }


def _longcat_audio(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 9, 8),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_attention_mask": padding_mask((6, 4), 6),
        "timestep": timestep(0.875, 2),
        "attention_mask": padding_mask((9, 9), 9),
        "latent_cond": torch.zeros(2, 9, 8),
    }


def _longcat_image(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 6, 8),
        "timestep": timestep(875.0) / 1000,
        "guidance": None,
        "encoder_hidden_states": random.normal(1, 5, 16),
        "txt_ids": torch.tensor([[0.0, index, index] for index in range(5)]),
        "img_ids": grid_ids(2, 3, first=1.0, start=512.0),
    }


def _lumina_2(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 4, 6),
        "timestep": 1 - timestep(875.0, 2) / 1000,
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_attention_mask": padding_mask((6, 4), 6, torch.int64),
        "attention_kwargs": None,
    }


def _lumina_next(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 4, 6),
        "timestep": 1 - timestep(875.0, 2) / 1000,
        "encoder_hidden_states": random.normal(2, 6, 16),
        "encoder_mask": padding_mask((6, 4), 6, torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 384, 384),
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }


def _minimax_h3(random: Random) -> dict[str, object]:
    # One packed sequence: text, the first frame as a condition, two audio channels, the video.
    text, audio_steps, frames, frame_ids = 5, 3, 2, grid_ids(2, 3).double()
    ids = torch.zeros(text, 3, dtype=torch.float64)
    ids[:, 0] = torch.arange(text)
    condition, *video = (frame_ids + torch.tensor([text + time, 0, 0]) for time in (0, 0, 5 / 3))
    audio = torch.zeros(2, audio_steps, 3, dtype=torch.float64)
    audio[..., 0] = text + torch.arange(audio_steps)
    audio[1, :, 2] = frame_ids[-1, 2]
    rows = torch.tensor([text, len(condition), 2 * audio_steps, frames * len(condition)])
    text_rows, condition_rows, audio_rows, video_rows = torch.arange(int(rows.sum())).split(rows.tolist())
    return {
        "hidden_states": random.normal(1, len(condition_rows) + len(video_rows), 16),
        "audio_hidden_states": random.normal(1, len(audio_rows), 6),
        "encoder_hidden_states": random.normal(1, text, 16),
        "timestep": torch.tensor([0.25, 0.5, 0.75]),
        "timestep_indices": torch.tensor([0, 2, 1, 0]).repeat_interleave(rows),
        "token_tags": torch.tensor([1, 0, 2, 0]).repeat_interleave(rows),
        "position_ids": torch.cat([ids, condition, audio.flatten(0, 1), *video]),
        "video_indices": torch.cat([condition_rows, video_rows]),
        "audio_indices": audio_rows,
        "text_indices": text_rows,
        "attention_kwargs": None,
    }


def _minimax_music_depth(random: Random) -> dict[str, object]:
    return {"inputs_embeds": random.normal(2, 3, 32)}


def _minimax_music(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 8, 9),
        "timestep": timestep(0.125),
        "encoder_hidden_states": random.normal(1, 9, 16),
    }


def _mochi(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(2, 4, 2, 4, 6),
        "encoder_hidden_states": random.normal(2, 6, 16),
        "timestep": timestep(875.0, 2),
        "encoder_attention_mask": padding_mask((6, 4), 6),
        "attention_kwargs": None,
    }


def _motif_video(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 9, 2, 4, 6),
        "timestep": timestep(875.0),
        "encoder_hidden_states": random.normal(1, 6, 16),
        "encoder_attention_mask": padding_mask((4,), 6),
        "image_embeds": random.normal(1, 5, 12),
        "attention_kwargs": None,
    }


ENTRIES = (
    ClassEntry(
        "LTX2VideoTransformer3DModel",  # as in LTX-2.3
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "num_layers": 2,
            "rope_type": "split",
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
        },
        _ltx_2_video,
    ),
    ClassEntry(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 16,
        },
        _ltx_video,
    ),
    ClassEntry(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 16,
            "video_length": 3,
        },
        _latte,
    ),
    ClassEntry(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": 16,
            "latent_dim": 8,
        },
        _longcat_audio,
    ),
    ClassEntry(
        "LongCatImageTransformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": [8, 4, 4],
        },
        _longcat_image,
    ),
    ClassEntry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (30, 16, 16),
            "cap_feat_dim": 16,
        },
        _lumina_2,
    ),
    ClassEntry(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 16,
        },
        _lumina_next,
    ),
    ClassEntry(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 32,
            "num_layers": 2,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    ClassEntry(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "audio_vocab_size": 20,
            "num_codebooks": 4,
        },
        _minimax_music_depth,
    ),
    ClassEntry(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        _minimax_music,
    ),
    ClassEntry(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 3,  # the last one leaves the text as it is
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
        },
        _mochi,
    ),
    ClassEntry(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "text_embed_dim": 16,
            "image_embed_dim": 12,
            "rope_axes_dim": (8, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif_video,
    ),
)
