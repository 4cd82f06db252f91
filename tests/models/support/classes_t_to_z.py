"""Entries of the classes from T5 FiLM to Z-Image."""

from __future__ import annotations

import torch
from class_entry import ClassEntry, Random
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from sequence_arguments import padding_mask, timestep

_WAN = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_WAN_TEXT_TOKENS = 512  # fixed in Wan's attention to images


def _t5_film(random: Random) -> dict[str, object]:
    """Notes, and the spectrogram of the previous part."""
    return {
        "encodings_and_masks": [
            (random.normal(1, 9, 32), padding_mask((6,), 9)),
            (random.normal(1, 12, 32), padding_mask((12,), 12)),
        ],
        "decoder_input_tokens": random.normal(1, 12, 8),
        "decoder_noise_time": torch.tensor([0.35]),
    }


def _transformer_2d(random: Random) -> dict[str, object]:
    """The arguments of a block of ``UNet2DConditionModel``; its masks are biases."""
    return {
        "hidden_states": random.normal(2, 32, 4, 6),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "cross_attention_kwargs": None,
        "attention_mask": None,
        "encoder_attention_mask": (1 - padding_mask((7, 4), 7, torch.float32))[:, None] * -10_000.0,
    }


def _transformer_2d_discrete(random: Random) -> dict[str, object]:
    """VQ-Diffusion: the codes of an image's cells; the result is the logarithm of their probabilities."""
    return {
        "hidden_states": random.integers(0, 20, 2, 16),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "timestep": torch.tensor(40),
    }


def _transformer_temporal(random: Random) -> dict[str, object]:
    """The arguments of a block of ``UNet3DConditionModel``: two videos of three frames, one after the other."""
    return {"hidden_states": random.normal(6, 32, 2, 3), "num_frames": 3, "cross_attention_kwargs": None}


def _wan_animate_2(random: Random) -> dict[str, object]:
    """The pass over the reference: it fills the cache. Samples are in lists."""
    return {
        "hidden_states": [random.normal(4, 2, 4, 6)],
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": [random.normal(5, 24)],
        "encoder_hidden_states_image": random.normal(1, 6, 1280),
        "condition_latents": [random.normal(8, 2, 4, 6)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 12,
        "offset_grid_sizes": torch.tensor([[2, 2, 3]]),
    }


def _wan_animate_2_cached(random: Random) -> dict[str, object]:
    """A step: one frame for the image of the person, and two of the video, against the reference in the cache.

    The class compiles its attention mask in the first call, which takes seconds to a minute.
    """
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(random.normal(1, 12, 2, 16), random.normal(1, 12, 2, 16))
    return {
        "hidden_states": [random.normal(4, 3, 4, 6)],
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": [random.normal(5, 24)],
        "encoder_hidden_states_image": random.normal(1, 6, 1280),
        "condition_latents": [random.normal(8, 3, 4, 6)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 18,
        "reference_grid_sizes": torch.tensor([[2, 2, 3]]),
        "origin_len": 5,
        "origin_area": [32, 48],
        "is_uncondtion": False,
    }


def _wan_animate(random: Random) -> dict[str, object]:
    """Five frames of a video: two frames of latents, before which stands the reference's."""
    return {
        "hidden_states": random.normal(2, 12, 3, 4, 6),
        "timestep": timestep(700, 2, torch.int64),
        "encoder_hidden_states": random.normal(2, _WAN_TEXT_TOKENS, 24),
        "encoder_hidden_states_image": random.normal(2, 6, 40),
        "pose_hidden_states": random.normal(2, 4, 2, 4, 6),
        "face_pixel_values": random.normal(2, 3, 5, 16, 16).tanh(),
        "motion_encode_batch_size": 4,
        "attention_kwargs": None,
    }


def _wan(random: Random) -> dict[str, object]:
    """Image to video of Wan 2.1: noise, and in more channels the mask and latents of the first frame."""
    return {
        "hidden_states": random.normal(2, 12, 3, 4, 6),
        "timestep": timestep(700, 2, torch.int64),
        "encoder_hidden_states": random.normal(2, _WAN_TEXT_TOKENS, 24),
        "encoder_hidden_states_image": random.normal(2, 6, 40),
        "attention_kwargs": None,
    }


def _wan_timestep_per_token(random: Random) -> dict[str, object]:
    """Image to video of Wan 2.2 5B: the timestep of the first frame's tokens is 0."""
    timesteps = torch.full((2, 18), 700.0)
    timesteps[:, :6] = 0
    return {
        "hidden_states": random.normal(2, 12, 3, 4, 6),
        "timestep": timesteps,
        "encoder_hidden_states": random.normal(2, 7, 24),
        "encoder_hidden_states_image": None,
        "attention_kwargs": None,
    }


def _wan_vace(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 4, 3, 4, 6),
        "timestep": timestep(700, 1, torch.int64),
        "encoder_hidden_states": random.normal(1, 7, 24),
        "control_hidden_states": random.normal(1, 12, 3, 4, 6),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
        "attention_kwargs": None,
    }


def _z_image(random: Random) -> dict[str, object]:
    """Guidance, with a ControlNet: images and prompts in lists, the first prompt longer than a multiple of 32.

    The residuals have the length of the longest row: 32 tokens of the image, 64 of the prompt.
    """
    latents = random.normal(4, 1, 8, 12)
    return {
        "x": [latents, latents.clone()],
        "t": torch.full((2,), 0.4),
        "cap_feats": [random.normal(40, 24), random.normal(5, 24)],
        "controlnet_block_samples": {0: random.normal(2, 96, 32)},
        "joint_attention_kwargs": None,
    }


def _z_image_omni(random: Random) -> dict[str, object]:
    """An edit under guidance: in each sample one clean image before the target, and SigLIP's features of it."""
    target, reference = random.normal(4, 1, 8, 12), random.normal(4, 1, 8, 8)
    features = random.normal(3, 3, 40)
    return {
        "x": [[reference, target], [reference.clone(), target.clone()]],
        "t": torch.full((2,), 0.4),
        "cap_feats": [[random.normal(tokens, 24) for tokens in lengths] for lengths in ((40, 3, 2), (5, 3, 2))],
        "siglip_feats": [[features, None], [features.clone(), None]],
        "image_noise_mask": [[0, 1], [0, 1]],
        "joint_attention_kwargs": None,
    }


_WAN_ANIMATE_2 = {
    "text_len": 8,
    "in_dim": 12,
    "dim": 32,
    "ffn_dim": 48,
    "freq_dim": 32,
    "text_dim": 24,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
}
_Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 16, 16],
}

ENTRIES = (
    ClassEntry(
        "T5FilmDecoder",
        {
            "input_dims": 8,
            "targets_length": 12,
            "max_decoder_noise_time": 20_000.0,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 48,
        },
        _t5_film,
    ),
    ClassEntry(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "norm_type": "layer_norm",  # ``from_config`` reads it
        },
        _transformer_2d,
    ),
    ClassEntry(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "attention_bias": True,
            "sample_size": 4,
            "num_vector_embeds": 21,
            "activation_fn": "geglu-approximate",
            "num_embeds_ada_norm": 100,
            "norm_type": "ada_norm",
        },
        _transformer_2d_discrete,
        "discrete",
    ),
    ClassEntry(
        "TransformerTemporalModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
        },
        _transformer_temporal,
    ),
    ClassEntry("WanAnimate2Transformer3DModel", _WAN_ANIMATE_2, _wan_animate_2),
    ClassEntry("WanAnimate2Transformer3DModel", _WAN_ANIMATE_2, _wan_animate_2_cached, "kv_cached"),
    ClassEntry(
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "image_dim": 40,
            "added_kv_proj_dim": 32,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        _wan_animate,
    ),
    ClassEntry(
        "WanTransformer3DModel",
        {**_WAN, "in_channels": 12, "out_channels": 4, "image_dim": 40, "added_kv_proj_dim": 32},
        _wan,
    ),
    ClassEntry(
        "WanTransformer3DModel",
        {**_WAN, "in_channels": 12, "out_channels": 4},
        _wan_timestep_per_token,
        "timestep_per_token",
    ),
    ClassEntry(
        "WanVACETransformer3DModel",
        {**_WAN, "in_channels": 4, "out_channels": 4, "vace_layers": [0, 1], "vace_in_channels": 12},
        _wan_vace,
    ),
    ClassEntry("ZImageTransformer2DModel", _Z_IMAGE, _z_image),
    ClassEntry("ZImageTransformer2DModel", {**_Z_IMAGE, "siglip_feat_dim": 40}, _z_image_omni, "omni"),
)
