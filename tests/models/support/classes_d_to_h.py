"""Entries of the classes from DiT to Helios."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import ClassEntry, Random
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0
from model_arguments import flux_image_ids, grid_ids, padding_mask, timestep


def _dit(random: Random) -> dict[str, Any]:
    """A class, and for the other half of the guidance the class that stands for none."""
    return {
        "hidden_states": random.normal(1, 4, 8, 8).repeat(2, 1, 1, 1),
        "timestep": timestep(500, dtype=torch.int64),
        "class_labels": torch.tensor([3, 10]),
    }


def _dream_lite(random: Random) -> dict[str, Any]:
    """What ``DreamLiteUNetModel`` gives, of which the class is a part: the text's mask as a bias."""
    bias = (1 - padding_mask((5, 7), 7, torch.float32)) * -10000.0
    return {
        "hidden_states": random.normal(2, 32, 4, 4),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "cross_attention_kwargs": None,
        "attention_mask": None,
        "encoder_attention_mask": bias[:, None],
    }


def _set_dream_lite_processors(model: torch.nn.Module) -> None:
    """Set the processors of ``DreamLiteUNetModel``: the default ones have no grouped queries."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())


def _easy_animate(random: Random) -> dict[str, Any]:
    """Inpainting: a mask and the latents of the masked video."""
    return {
        "hidden_states": random.normal(2, 4, 2, 8, 8),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "inpaint_latents": random.normal(2, 5, 2, 8, 8),
    }


def _ernie_image(random: Random) -> dict[str, Any]:
    lengths = (4, 7)
    return {
        "hidden_states": random.normal(2, 4, 4, 4),
        "timestep": torch.full((2,), 500.0),
        "text_bth": random.normal(2, 7, 16) * padding_mask(lengths, 7)[..., None],
        "text_lens": torch.tensor(lengths),
    }


def _flux(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 16, 16),
        "timestep": timestep(500.0) / 1000,
        "guidance": torch.full([1], 3.5).expand(2),
        "pooled_projections": random.normal(2, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": flux_image_ids(4, 4),
        "joint_attention_kwargs": {},
    }


def _flux_controlnet(random: Random) -> dict[str, Any]:
    """Residuals of a ControlNet with fewer blocks than the model."""
    return _flux(random) | {
        "controlnet_block_samples": [random.normal(2, 16, 32) for _ in range(2)],
        "controlnet_single_block_samples": [random.normal(2, 16, 32)],
        "controlnet_blocks_repeat": False,
    }


def _flux_ip_adapter(random: Random) -> dict[str, Any]:
    """One image prompt of eight features for the adapter."""
    return _flux(random) | {"joint_attention_kwargs": {"ip_adapter_image_embeds": [random.normal(2, 1, 8)]}}


def _set_flux_ip_adapter(model: Any) -> None:
    """Add what ``load_ip_adapter`` adds: a projection, and processors that are modules with parameters."""
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 16, num_image_text_embeds=4)])
    model.config.encoder_hid_dim_type = "ip_image_proj"
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 16, num_tokens=(4,), scale=[0.7]))


def _flux_2(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 16, 16),
        "timestep": timestep(500.0) / 1000,
        "guidance": torch.full([1], 4.0).expand(2),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "txt_ids": grid_ids(0, 1, 1, 7).repeat(2, 1, 1),
        "img_ids": grid_ids(0, 4, 4).expand(2, -1, -1),
        "joint_attention_kwargs": None,
    }


def _set_flux_2_kv_processors(model: Any) -> None:
    """Set the processors of ``Flux2KleinKVPipeline``: the default ones ignore the cache."""
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())


def _flux_2_extract(random: Random) -> dict[str, Any]:
    """The first step, with six tokens of a reference image before the image's own."""
    ids = torch.cat([grid_ids(10, 2, 3), grid_ids(0, 4, 4)])
    return _flux_2(random) | {
        "hidden_states": random.normal(2, 22, 16),
        "guidance": None,
        "img_ids": ids.repeat(2, 1, 1),
        "kv_cache_mode": "extract",
        "num_ref_tokens": 6,
    }


def _flux_2_cached(random: Random) -> dict[str, Any]:
    """A later step, with the keys and values of six reference tokens."""
    cache = Flux2KVCache(num_double_layers=2, num_single_layers=2)
    cache.num_ref_tokens = 6
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(random.normal(2, 6, 2, 16), random.normal(2, 6, 2, 16))
    return _flux_2(random) | {"guidance": None, "kv_cache": cache, "kv_cache_mode": "cached"}


def _flux_3_image(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 16, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "timestep": timestep(0.5),
        "img_ids": grid_ids(0, 4, 4).float(),
        "txt_ids": grid_ids(0, 1, 1, 7).float(),
    }


def _flux_3(random: Random) -> dict[str, Any]:
    """Image to image: one reference image of six tokens, on layer -1."""
    return _flux_3_image(random) | {
        "image_cond_hidden_states": random.normal(2, 6, 8),
        "image_cond_ids": grid_ids(0, 2, 3).float() - torch.tensor([0.0, 0.0, 0.0, 1.0]),
    }


def _glm_image(random: Random) -> dict[str, Any]:
    """Text to image: the pipeline gives a cache that is not in use."""
    return {
        "hidden_states": random.normal(2, 4, 8, 8),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "prior_token_id": random.integers(0, 32, 2, 16),
        "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
        "timestep": timestep(500.0) - 1,
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(2, 1),
        "crop_coords": torch.zeros(2, 2),
        "attention_kwargs": None,
        "kv_caches": GlmImageKVCache(num_layers=2),
    }


def _glm_image_write(random: Random) -> dict[str, Any]:
    """The call before the first step, for one image to edit: no text, and the cache is written."""
    caches = GlmImageKVCache(num_layers=2)
    caches.set_mode("write")
    return {
        "hidden_states": random.normal(1, 4, 4, 8),
        "encoder_hidden_states": random.normal(1, 0, 16),
        "prior_token_id": random.integers(0, 32, 8),
        "prior_token_drop": torch.zeros(8, dtype=torch.bool),
        "timestep": torch.zeros(1),
        "target_size": torch.tensor([[32, 64]]),
        "crop_coords": torch.zeros(1, 2),
        "attention_kwargs": None,
        "kv_caches": caches,
    }


def _glm_image_read(random: Random) -> dict[str, Any]:
    """A step with the keys and values of an image of eight tokens for each sample."""
    caches = GlmImageKVCache(num_layers=2)
    for _ in range(2):
        for layer in caches.caches:
            layer.store(random.normal(1, 8, 2, 16), random.normal(1, 8, 2, 16))
        caches.next_sample()
    caches.set_mode("read")
    return _glm_image(random) | {"kv_caches": caches}


def _helios(random: Random) -> dict[str, Any]:
    """A chunk of three frames after a history of 4, 2 and 1 frames and the video's first."""
    long, mid, short, chunk = torch.arange(1, 11)[None].split([4, 2, 1, 3], dim=1)
    return {
        "hidden_states": random.normal(2, 4, 3, 8, 8),
        "timestep": timestep(500.0),
        "encoder_hidden_states": random.normal(2, 7, 16),
        "indices_hidden_states": chunk,
        "indices_latents_history_short": torch.cat([torch.zeros_like(short), short], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": random.normal(2, 4, 2, 8, 8),
        "latents_history_mid": random.normal(2, 4, 2, 8, 8),
        "latents_history_long": random.normal(2, 4, 4, 8, 8),
        "attention_kwargs": None,
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_DREAM_LITE = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 32,
    "num_layers": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "use_linear_projection": True,
    "qk_norm": "rms_norm",
    "num_kv_heads": 2,
    "ff_mult": 3,
}
_FLUX = _HEADS | {
    "in_channels": 16,
    "num_single_layers": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
_FLUX_2 = _HEADS | {
    "in_channels": 16,
    "num_single_layers": 2,
    "joint_attention_dim": 16,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
_FLUX_2_KLEIN = _FLUX_2 | {"guidance_embeds": False}
_FLUX_3 = _HEADS | {
    "in_channels": 8,
    "cond_in_channels": 8,
    "num_single_layers": 2,
    "joint_attention_dim": 16,
    "timestep_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
_GLM_IMAGE = _HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": 32,
}

ENTRIES = (
    ClassEntry(
        "DiTTransformer2DModel",
        _HEADS | {"out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
        _dit,
    ),
    ClassEntry("DreamLiteTransformer2DModel", _DREAM_LITE, _dream_lite, prepare=_set_dream_lite_processors),
    ClassEntry(
        "DreamLiteTransformer2DModel",
        _DREAM_LITE | {"use_self_attention": False},
        _dream_lite,
        "cross_attention_only",
        _set_dream_lite_processors,
    ),
    ClassEntry(
        "EasyAnimateTransformer3DModel",
        _HEADS
        | {
            "in_channels": 9,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 4,
            "mmdit_layers": 2,
            "time_embed_dim": 16,
            "add_norm_text_encoder": True,
            "text_embed_dim": 16,
        },
        _easy_animate,
    ),
    ClassEntry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        _ernie_image,
    ),
    ClassEntry("Flux2Transformer2DModel", _FLUX_2, _flux_2),
    ClassEntry("Flux2Transformer2DModel", _FLUX_2_KLEIN, _flux_2_extract, "kv_extract", _set_flux_2_kv_processors),
    ClassEntry("Flux2Transformer2DModel", _FLUX_2_KLEIN, _flux_2_cached, "kv_cached", _set_flux_2_kv_processors),
    ClassEntry("Flux3Transformer2DModel", _FLUX_3, _flux_3),
    ClassEntry(
        "Flux3Transformer2DModel",
        _FLUX_3 | {"flow_map": True},
        lambda random: _flux_3_image(random) | {"target_timestep": timestep(0.25)},
        "flow_map",
    ),
    ClassEntry("FluxTransformer2DModel", _FLUX, _flux),
    ClassEntry("FluxTransformer2DModel", _FLUX, _flux_controlnet, "controlnet"),
    ClassEntry("FluxTransformer2DModel", _FLUX, _flux_ip_adapter, "ip_adapter", _set_flux_ip_adapter),
    ClassEntry("GlmImageTransformer2DModel", _GLM_IMAGE, _glm_image),
    ClassEntry("GlmImageTransformer2DModel", _GLM_IMAGE, _glm_image_write, "kv_write"),
    ClassEntry("GlmImageTransformer2DModel", _GLM_IMAGE, _glm_image_read, "kv_read"),
    ClassEntry(
        "HeliosTransformer3DModel",
        _HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 48,
            "rope_dim": (4, 6, 6),
        },
        _helios,
    ),
)
