"""Small seeded checkpoints of text encoders, CLIP-L, T5 and UMT5, with the tensor names that users' files have.

As in :mod:`xditd.client.demo.checkpoints` the values are random, every tensor matters, and the same seed gives the same
bytes. What cannot matter, in any CLIP: ``self_attn.k_proj.bias``, which adds the same number to all logits of a query,
and softmax ignores that. The vocabularies have the real sizes, so that real tokenizers can be used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xditd.client.demo.checkpoints import normal, save_aligned

if TYPE_CHECKING:
    import torch

HEAD_SIZE = 64
CLIP_VOCABULARY = 49_408
CLIP_POSITIONS = 77
T5_VOCABULARY = 32_128
T5_BUCKETS = 32

Scaled = Iterator[tuple[str, tuple[int, ...], float, float]]
"""Name, shape, and mean and spread of the values."""


def clip_l_state_dict(
    seed: int,
    *,
    width: int = 128,
    layers: int = 2,
    vocabulary: int = CLIP_VOCABULARY,
    has_extras: bool = False,
    dtype: torch.dtype | None = None,
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """Make a CLIP text model; ``width`` is a multiple of 64, the size of a head.

    ``has_extras`` adds what files hold and FLUX.1 does not read: ``text_projection.weight``, ``logit_scale`` and
    ``position_ids``. ``prefix`` goes before every name (``transformer.``). ``dtype`` is float32 unless given.
    """
    import torch

    tensors = _draw(seed, _clip_l(width, layers, vocabulary), prefix, dtype)
    if has_extras:
        like = next(iter(tensors.values()))
        tensors[f"{prefix}text_projection.weight"] = normal(seed, "text_projection", (width, width)).to(like.dtype)
        tensors[f"{prefix}logit_scale"] = torch.tensor(4.6055, dtype=like.dtype)
        tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(CLIP_POSITIONS).expand((1, -1)).clone()
    return tensors


def t5_state_dict(
    seed: int,
    *,
    width: int = 128,
    heads: int = 2,
    layers: int = 2,
    inner: int = 256,
    vocabulary: int = T5_VOCABULARY,
    has_copy: bool = False,
    dtype: torch.dtype | None = None,
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """Make the encoder of a T5 v1.1. ``has_copy`` adds the token embedding under its second name."""
    tensors = _draw(seed, _t5(width, heads, layers, inner, vocabulary), prefix, dtype)
    if has_copy:
        tensors[f"{prefix}encoder.embed_tokens.weight"] = tensors[f"{prefix}shared.weight"].clone()
    return tensors


def umt5_state_dict(
    seed: int,
    *,
    width: int = 128,
    heads: int = 2,
    layers: int = 2,
    inner: int = 256,
    vocabulary: int = T5_VOCABULARY,
    has_extras: bool = False,
    dtype: torch.dtype | None = None,
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """Make a UMT5 encoder. ``has_extras`` adds the tokenizer that ComfyUI's files hold, and the second name."""
    import torch

    tensors = _draw(seed, _t5(width, heads, layers, inner, vocabulary, has_tables=True), prefix, dtype)
    if has_extras:
        tensors["spiece_model"] = torch.arange(200, dtype=torch.uint8)
        tensors[f"{prefix}encoder.embed_tokens.weight"] = tensors[f"{prefix}shared.weight"].clone()
    return tensors


def in_wans_names(umt5: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the encoder as Wan's own files spell it, which are read by ``T5Encoder`` of ``wan/modules/t5.py``."""
    spelled = {
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",
        "encoder.block": "blocks",
        "encoder.final_layer_norm": "norm",
        "shared": "token_embedding",
    }
    renamed = {}
    for name, tensor in umt5.items():
        own = name
        for theirs, wans in spelled.items():
            own = own.replace(theirs, wans)
        renamed[own] = tensor
    return renamed


def write_clip_l(path: Path, seed: int, *, width: int = 128, dtype: torch.dtype | None = None) -> None:
    """Write the demo CLIP-L to one safetensors file."""
    save_aligned(clip_l_state_dict(seed, width=width, dtype=dtype), path)


def write_umt5(path: Path, seed: int) -> None:
    """Write the demo UMT5 to one safetensors file, as ComfyUI's are."""
    save_aligned(umt5_state_dict(seed, has_extras=True), path)


def write_t5(path: Path, seed: int) -> None:
    """Write the demo T5 to one safetensors file."""
    save_aligned(t5_state_dict(seed), path)


def _draw(seed: int, scaled: Scaled, prefix: str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, shape, mean, spread in scaled:
        values = mean + spread * normal(seed, name, shape)
        tensors[prefix + name] = values if dtype is None else values.to(dtype)
    return tensors


def _linear(name: str, rows: int, columns: int) -> Scaled:
    yield f"{name}.weight", (rows, columns), 0.0, 1 / math.sqrt(columns)
    yield f"{name}.bias", (rows,), 0.0, 0.2


def _norm(name: str, width: int) -> Scaled:
    yield f"{name}.weight", (width,), 1.0, 0.3
    yield f"{name}.bias", (width,), 0.0, 0.2


def _clip_l(width: int, layers: int, vocabulary: int) -> Scaled:
    yield "text_model.embeddings.token_embedding.weight", (vocabulary, width), 0.0, 1.0
    yield "text_model.embeddings.position_embedding.weight", (CLIP_POSITIONS, width), 0.0, 0.5
    for number in range(layers):
        layer = f"text_model.encoder.layers.{number}"
        yield from _norm(f"{layer}.layer_norm1", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{part}", width, width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{layer}.mlp.fc2", width, 4 * width)
    yield from _norm("text_model.final_layer_norm", width)


def _t5(width: int, heads: int, layers: int, inner: int, vocabulary: int, *, has_tables: bool = False) -> Scaled:
    attended = heads * HEAD_SIZE
    yield "shared.weight", (vocabulary, width), 0.0, 1.0
    for number in range(layers):
        attention = f"encoder.block.{number}.layer.0"
        # T5 does not divide its logits by the root of the head size: its queries are small instead.
        yield f"{attention}.SelfAttention.q.weight", (attended, width), 0.0, 1 / math.sqrt(width * HEAD_SIZE)
        for part in ("k", "v"):
            yield f"{attention}.SelfAttention.{part}.weight", (attended, width), 0.0, 1 / math.sqrt(width)
        yield f"{attention}.SelfAttention.o.weight", (width, attended), 0.0, 1 / math.sqrt(attended)
        if number == 0 or has_tables:
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (T5_BUCKETS, heads), 0.0, 1.0
        yield f"{attention}.layer_norm.weight", (width,), 1.0, 0.3
        feed_forward = f"encoder.block.{number}.layer.1"
        for part in ("wi_0", "wi_1"):
            yield f"{feed_forward}.DenseReluDense.{part}.weight", (inner, width), 0.0, 1 / math.sqrt(width)
        yield f"{feed_forward}.DenseReluDense.wo.weight", (width, inner), 0.0, 1 / math.sqrt(inner)
        yield f"{feed_forward}.layer_norm.weight", (width,), 1.0, 0.3
    yield "encoder.final_layer_norm.weight", (width,), 1.0, 0.3
