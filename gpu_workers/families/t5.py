"""The encoder of T5 v1.1 (``t5xxl_fp16.safetensors``), in the names of transformers and ComfyUI.

The token embedding is ``shared.weight``; many files hold it again as ``encoder.embed_tokens.weight``. A decoder in the
file is not read. Everything is read from shapes but the buckets of relative positions: 32 up to a distance of 128
tokens in every T5.

Source: transformers, ``T5EncoderModel``; google/t5-v1_1-xxl, ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch

from xditd.gpu_workers.models.entries import Entry, Shape, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.full_precision import compute_in_float32
from xditd.gpu_workers.models.operations import Model
from xditd.gpu_workers.models.shapes import count_blocks, matrix
from xditd.gpu_workers.packed.embedding import PackedEmbedding
from xditd.ipc import limits
from xditd.ipc.errors import Unsupported
from xditd.ipc.facts import TextEncoderFacts

HEAD_SIZE = 64
BUCKETS = 32
MAX_DISTANCE = 128
MAX_LAYERS = 128

_BLOCK = re.compile(r"^encoder\.block\.\d+\.layer\.")
_TOKENS = "shared.weight"
_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"
_FEED_FORWARD = "encoder.block.{}.layer.1.DenseReluDense"
_BIAS = "relative_attention_bias.weight"


@dataclass(frozen=True, slots=True)
class T5Config:
    """The sizes of a T5 encoder; ``inner`` is the width of its feed-forward layers."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int

    @property
    def max_tokens(self) -> int:
        """Positions are relative, so only the memory of attention limits a text."""
        return limits.MAX_TEXT_TOKENS


class T5:
    """The family of T5 v1.1: see the module's docstring."""

    name = "t5"
    title = "the encoder of T5 v1.1 (t5xxl_fp16.safetensors)"
    kind: Kind = "text_encoder"
    tied: Mapping[str, str] = {"encoder.embed_tokens.weight": _TOKENS}
    ignored: re.Pattern[str] | None = re.compile(r"^(?:decoder|lm_head)\.")
    fused_widths: tuple[int, ...] = ()
    swapped_halves: frozenset[str] = frozenset()

    def claims(self, names: Collection[str]) -> bool:
        return any(map(_BLOCK.match, names))

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> T5Config:
        if f"{_ATTENTION.format(1)}.{_BIAS}" in shapes:
            raise Unsupported("t5: every block has a relative_attention_bias: this is UMT5, which FLUX.1 does not use")
        if f"{_FEED_FORWARD.format(0)}.wi.weight" in shapes:
            raise Unsupported("t5: its feed-forward layers have no gate (wi): this is T5 1.0; lend T5 v1.1")
        vocabulary, width = matrix("t5", shapes, _TOKENS)
        return T5Config(
            vocabulary=vocabulary,
            width=width,
            layers=count_blocks("t5", shapes, "encoder.block", MAX_LAYERS),
            heads=matrix("t5", shapes, f"{_ATTENTION.format(0)}.{_BIAS}")[1],
            inner=matrix("t5", shapes, f"{_FEED_FORWARD.format(0)}.wi_0.weight")[0],
        )

    def entries(self, config: T5Config, names: Collection[str]) -> Iterator[Entry]:
        width, attended = config.width, config.heads * HEAD_SIZE
        yield tensor_entry(_TOKENS, (config.vocabulary, width))
        for number in range(config.layers):
            attention, feed_forward = _ATTENTION.format(number), _FEED_FORWARD.format(number)
            for part in ("q", "k", "v"):
                yield tensor_entry(f"{attention}.{part}.weight", (attended, width))
            yield tensor_entry(f"{attention}.o.weight", (width, attended))
            if number == 0:  # all blocks use the first one's
                yield tensor_entry(f"{attention}.{_BIAS}", (BUCKETS, config.heads))
            yield tensor_entry(f"encoder.block.{number}.layer.0.layer_norm.weight", (width,))
            for part in ("wi_0", "wi_1"):
                yield tensor_entry(f"{feed_forward}.{part}.weight", (config.inner, width))
            yield tensor_entry(f"{feed_forward}.wo.weight", (width, config.inner))
            yield tensor_entry(f"encoder.block.{number}.layer.1.layer_norm.weight", (width,))
        yield tensor_entry("encoder.final_layer_norm.weight", (width,))

    @property
    def smallest(self) -> T5Config:
        return T5Config(vocabulary=HEAD_SIZE, width=HEAD_SIZE, layers=1, heads=1, inner=HEAD_SIZE)

    def lora_entries(self, config: T5Config) -> Iterator[Entry]:
        yield from self.entries(config, ())

    def heads(self, config: T5Config) -> int:
        return 0

    @property
    def operations(self) -> T5Operations:
        return T5Operations()


class T5Operations:
    """See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`."""

    def build(self, config: T5Config) -> torch.nn.Module:
        from transformers import T5Config as TransformersT5Config
        from transformers import T5EncoderModel

        model = T5EncoderModel(
            TransformersT5Config(
                vocab_size=config.vocabulary,
                d_model=config.width,
                d_kv=HEAD_SIZE,
                d_ff=config.inner,
                num_layers=config.layers,
                num_heads=config.heads,
                relative_attention_num_buckets=BUCKETS,
                relative_attention_max_distance=MAX_DISTANCE,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        model.set_input_embeddings(model.shared)  # one module in both places, so that one parameter fills both
        compute_in_float32([*model.encoder.block, model.encoder.final_layer_norm], model.shared)
        return cast(torch.nn.Module, model)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: T5Config) -> TextEncoderFacts:
        return TextEncoderFacts(width=config.width, max_tokens=config.max_tokens, has_pooled=False)

    def vocabulary(self, config: T5Config) -> int:
        return config.vocabulary

    @torch.inference_mode()
    def encode(
        self, model: Model[T5Config], token_ids: torch.Tensor, *, pooled: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        table = model.module.get_submodule("shared")
        states = table(token_ids.to(model.device))
        if isinstance(table, PackedEmbedding) and table.packed.format == "float8" and table.packed.scale is None:
            states = torch.nan_to_num(states)  # files in plain fp8 have NaN in rows of their table; so does ComfyUI
        return cast(torch.Tensor, model.module(inputs_embeds=states).last_hidden_state), None
