"""Entries of the classes from Nucleus to Qwen-Image."""

from __future__ import annotations

import torch
from class_entry import ClassEntry, Random
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from sequence_arguments import grid_ids, padding_mask, timestep


def _nucleus(random: Random) -> dict[str, object]:
    """Two prompts of unequal length."""
    return {
        "hidden_states": random.normal(2, 24, 16),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "encoder_hidden_states_mask": padding_mask((7, 4), 7, torch.int64),
        "img_shapes": [(1, 4, 6)] * 2,
        "attention_kwargs": None,
    }


def _omnigen(random: Random) -> dict[str, object]:
    """A prompt with one image under guidance: rows for the prompt, for none, and for the image alone.

    Shorter prompts are padded on the left. Attention is causal in the text and complete in each image.
    """
    text, image, target = 10, 4, 16
    lengths = (10, 5, 6)
    image_spans = {0: [[3, 3 + image]], 2: [[5, 5 + image]]}
    total = text + 1 + target  # one token holds the time
    mask = torch.ones(total, total).tril().repeat(3, 1, 1)
    positions = torch.zeros(3, total, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padding = text - length
        mask[row, -target:] = 1
        mask[row, :, :padding] = 0
        mask[row, :padding] = 1
        positions[row, padding:] = torch.arange(total - padding)
        for start, end in image_spans.get(row, []):
            mask[row, start:end, start:end] = 1
    return {
        "hidden_states": random.normal(1, 4, 8, 8).repeat(3, 1, 1, 1),
        "timestep": timestep(0.3, 3),
        "input_ids": random.integers(1, 50, 3, text),
        "input_img_latents": [random.normal(1, 4, 4, 4), random.normal(1, 4, 4, 4)],
        "input_image_sizes": image_spans,
        "attention_mask": mask,
        "position_ids": positions,
    }


def _ovis(random: Random) -> dict[str, object]:
    positions = torch.arange(7.0)
    return {
        "hidden_states": random.normal(1, 24, 16),
        "timestep": torch.tensor([0.875]),
        "encoder_hidden_states": random.normal(1, 7, 24),
        "txt_ids": torch.stack([positions * 0, positions, positions], dim=1),
        "img_ids": grid_ids(4, 6),
        "joint_attention_kwargs": None,
    }


def _prx(random: Random) -> dict[str, object]:
    """Guidance: the row of the empty prompt has fewer tokens."""
    return {
        "hidden_states": random.normal(1, 4, 8, 12).repeat(2, 1, 1, 1),
        "timestep": torch.full((2,), 0.625),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "attention_mask": padding_mask((2, 7), 7),
    }


def _pixart(random: Random) -> dict[str, object]:
    """Guidance, with the resolution and aspect ratio of the 1024-pixel models."""
    return {
        "hidden_states": random.normal(1, 4, 8, 12).repeat(2, 1, 1, 1),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "encoder_attention_mask": padding_mask((2, 7), 7, torch.int64),
        "timestep": timestep(500, 2, torch.int64),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 96.0]] * 2),
            "aspect_ratio": torch.tensor([[64.0 / 96.0]] * 2),
        },
    }


def _prior(random: Random) -> dict[str, object]:
    """Kandinsky 2.2 under guidance; the timestep is a scalar tensor."""
    return {
        "hidden_states": random.normal(1, 24).repeat(2, 1),
        "timestep": torch.tensor(400),
        "proj_embedding": random.normal(2, 24),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "attention_mask": padding_mask((2, 7), 7),
    }


def _qwen_image(random: Random) -> dict[str, object]:
    """An edit of two prompts: the target's tokens, then those of one reference."""
    return {
        "hidden_states": random.normal(2, 24 + 8, 16),
        "timestep": torch.full((2,), 0.7),
        "guidance": None,
        "encoder_hidden_states_mask": padding_mask((7, 4), 7, torch.int64),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "img_shapes": [[(1, 4, 6), (1, 2, 4)]] * 2,
        "attention_kwargs": None,
    }


def _qwen_image_layered(random: Random) -> dict[str, object]:
    """Two layers, the composite and the given image. The class adds an embedding of ``additional_t_cond``."""
    return {
        "hidden_states": random.normal(1, 4 * 24, 16),
        "timestep": torch.full((1,), 0.7),
        "guidance": None,
        "encoder_hidden_states_mask": None,
        "encoder_hidden_states": random.normal(1, 7, 24),
        "img_shapes": [[(1, 4, 6)] * 4],
        "attention_kwargs": None,
        "additional_t_cond": torch.tensor([0]),
    }


def _qwen_image_controlnet(random: Random) -> dict[str, object]:
    """Text to image of a single prompt, with the residuals of a ControlNet of one block."""
    return {
        "hidden_states": random.normal(1, 24, 16),
        "timestep": torch.full((1,), 0.7),
        "encoder_hidden_states": random.normal(1, 7, 24),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, 4, 6)]],
        "controlnet_block_samples": [random.normal(1, 24, 32)],
        "attention_kwargs": None,
    }


def _qwen_image_21(random: Random) -> dict[str, object]:
    """The first step of an edit of two prompts: it fills the cache.

    A slot of the prompt stands for four tokens of the reference. The slots of the target follow the prompt.
    """
    slots = torch.zeros(2, 9, dtype=torch.bool)
    slots[:, 3:7] = True
    return {
        "hidden_states": random.normal(2, 16 + 24, 16),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": random.normal(2, 9, 24),
        "encoder_hidden_states_mask": padding_mask((9, 8), 9, torch.int64),
        "img_shapes": [[(1, 4, 4), (1, 4, 6)]] * 2,
        "img_mask": torch.cat([slots, torch.ones(2, 6, dtype=torch.bool)], dim=1),
        "attention_kwargs": None,
        "kv_cache": QwenImage21KVCache(2),
        "kv_cache_mode": "extract",
    }


def _qwen_image_21_cached(random: Random) -> dict[str, object]:
    """A later step: the keys and values of the prompt's 5 tokens and the reference's 16 are in the cache."""
    arguments = _qwen_image_21(random)
    cache = QwenImage21KVCache(2)
    for layer in cache.layer_caches:
        layer.store(random.normal(2, 21, 2, 16), random.normal(2, 21, 2, 16))
    return {**arguments, "kv_cache": cache, "kv_cache_mode": "cached"}


_QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 6, 6],
}
_QWEN_IMAGE_21 = {
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 24,
    "axes_dims_rope": [4, 6, 6],
}

ENTRIES = (
    ClassEntry(
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": [4, 6, 6],
            "mlp_ratio": 4.0,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 32,
            "capacity_factors": [2.0, 2.0, 2.0, 1.0],
        },
        _nucleus,
    ),
    ClassEntry(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 50,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 8,
        },
        _omnigen,
    ),
    ClassEntry(
        "OvisImageTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": [4, 6, 6],
        },
        _ovis,
    ),
    ClassEntry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 24,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        _prx,
    ),
    ClassEntry(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "use_additional_conditions": True,
            "caption_channels": 24,
        },
        _pixart,
    ),
    ClassEntry(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "embedding_dim": 24,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        _prior,
    ),
    ClassEntry("QwenImage21Transformer2DModel", _QWEN_IMAGE_21, _qwen_image_21),
    ClassEntry("QwenImage21Transformer2DModel", _QWEN_IMAGE_21, _qwen_image_21_cached, "kv_cached"),
    ClassEntry("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image),
    ClassEntry("QwenImageTransformer2DModel", {**_QWEN_IMAGE, "zero_cond_t": True}, _qwen_image, "zero_cond_t"),
    ClassEntry(
        "QwenImageTransformer2DModel",
        {**_QWEN_IMAGE, "use_additional_t_cond": True, "use_layer3d_rope": True},
        _qwen_image_layered,
        "layered",
    ),
    ClassEntry("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image_controlnet, "controlnet"),
)
