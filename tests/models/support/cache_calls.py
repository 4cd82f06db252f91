"""Calls with caches of keys and values beside those of the entries: other numbers of tokens and heads, other modes."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import Random
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from further_calls import further
from model_arguments import grid_ids

_GLM_IMAGE = "GlmImageTransformer2DModel"
_FLUX_2 = "Flux2Transformer2DModel"
_QWEN_IMAGE = "QwenImage21Transformer2DModel"
_REFINER = "SanaWMLTX2RefinerTransformer3DModel"


def _flux_2_odd(random: Random) -> dict[str, Any]:
    """A single row of 5 text tokens, 14 of the image, and 7 of a reference, which no number of ranks divides."""
    return {
        "hidden_states": random.normal(1, 14, 16),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": random.normal(1, 5, 16),
        "txt_ids": grid_ids(0, 1, 1, 5)[None],
        "img_ids": grid_ids(0, 2, 7)[None],
    }


def _flux_2_extract(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    odd = _flux_2_odd(random)
    return odd | {
        "hidden_states": random.normal(1, 21, 16),
        "img_ids": torch.cat([grid_ids(10, 1, 7)[None], odd["img_ids"]], dim=1),
        "num_ref_tokens": 7,
    }


def _flux_2_cached(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    cache = Flux2KVCache(num_double_layers=2, num_single_layers=2)
    cache.num_ref_tokens = 7
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(random.normal(1, 7, 2, 16), random.normal(1, 7, 2, 16))
    return _flux_2_odd(random) | {"kv_cache": cache}


def _no_references(_: Random, given: dict[str, Any]) -> dict[str, Any]:
    """The first step without a reference image makes no cache."""
    return {"num_ref_tokens": 0, "hidden_states": given["hidden_states"][:, 6:], "img_ids": given["img_ids"][:, 6:]}


def _of_one_sample(random: Random, mode: str) -> dict[str, Any]:
    """A cache with seven tokens of one sample's image."""
    cache = GlmImageKVCache(num_layers=2)
    for layer in cache.caches:
        layer.store(random.normal(1, 7, 2, 16), random.normal(1, 7, 2, 16))
    cache.set_mode(mode)
    return {"kv_caches": cache}


def _five_heads(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    cache = QwenImage21KVCache(2)
    for layer in cache.layer_caches:
        layer.store(random.normal(2, 21, 5, 16), random.normal(2, 21, 5, 16))
    return {"kv_cache": cache}


def _without_history(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    cache = given["kv_cache"]
    for layer in cache.layer_caches:
        layer.history_k = layer.history_v = None
    return {"kv_cache": cache, "kv_cache_mode": "inject"}


def _empty_history(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    cache = given["kv_cache"]
    for layer in cache.layer_caches:
        layer.store_history(random.normal(1, 0, 32), random.normal(1, 0, 32))
    return {"kv_cache": cache}


def _captured_before(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    """What earlier calls have captured, and the caller has not taken."""
    cache = given["kv_cache"]
    for layer in cache.layer_caches:
        layer.store_captured_pre_rope(random.normal(1, 12, 32), random.normal(1, 12, 32))
        layer.store_captured_post_rope(random.normal(1, 7, 32), random.normal(1, 7, 32))
    return {"kv_cache": cache}


def _refiner_odd(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    """Eleven tokens of two rows, of which the keys of eleven earlier ones are in the cache."""
    cache = given["kv_cache"]
    for layer in cache.layer_caches:
        layer.store_history(random.normal(2, 11, 32), random.normal(2, 11, 32))
        layer.store_sink(random.normal(2, 6, 32), random.normal(2, 6, 32))
    return {
        "hidden_states": random.normal(2, 11, 8),
        "encoder_hidden_states": random.normal(2, 7, 24),
        "timestep": random.normal(2, 11).abs(),
        "video_rotary_emb": tuple(each[:, :11] for each in given["video_rotary_emb"]),
        "encoder_attention_mask": None,
        "kv_cache": cache,
    }


CACHE_CALLS = (
    further(f"{_FLUX_2}-kv_extract", "kv_extract_odd", _flux_2_extract),
    further(f"{_FLUX_2}-kv_extract", "kv_extract_nothing", _no_references),
    further(f"{_FLUX_2}-kv_cached", "kv_cached_odd", _flux_2_cached),
    further(f"{_FLUX_2}-kv_cached", "kv_ignored", lambda *_: {"kv_cache_mode": None}),
    further(f"{_GLM_IMAGE}-kv_write", "kv_append", lambda random, _: _of_one_sample(random, "write")),
    further(
        f"{_GLM_IMAGE}-kv_write", "kv_write_text", lambda random, _: {"encoder_hidden_states": random.normal(1, 5, 16)}
    ),
    further(f"{_GLM_IMAGE}-kv_read", "kv_read_one", lambda random, _: _of_one_sample(random, "read")),
    further(f"{_GLM_IMAGE}-kv_read", "kv_skip", lambda random, _: _of_one_sample(random, "skip")),
    further(_QWEN_IMAGE, "five_heads", num_attention_heads=5),
    further(f"{_QWEN_IMAGE}-kv_cached", "kv_cached_five_heads", _five_heads, num_attention_heads=5),
    further(_REFINER, "capture_sink", lambda *_: {"kv_cache_mode": "capture_pre_rope"}),
    further(_REFINER, "without_history", _without_history),
    further(_REFINER, "empty_history", _empty_history),
    further(_REFINER, "captured_before", _captured_before),
    further(_REFINER, "odd", _refiner_odd),
)
"""Their variants say what differs."""
