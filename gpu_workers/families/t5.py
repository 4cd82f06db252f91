"""The encoders of T5 v1.1 (``t5xxl_fp16.safetensors``) and of UMT5, Wan's (``umt5_xxl_fp16.safetensors``).

Names are those of transformers and ComfyUI, of UMT5 also those of Wan's own files. The token embedding is
``shared.weight``; many files hold it again as ``encoder.embed_tokens.weight``. A decoder in the file is not read.
Everything is read from shapes but the buckets of relative positions: 32 up to a distance of 128 tokens in every T5.
In UMT5 every block has its own table of them, and it takes masks.

Source: transformers, ``T5EncoderModel`` and ``UMT5EncoderModel``; google/t5-v1_1-xxl, ``config.json``; Wan 2.1,
``wan/modules/t5.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

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
_OF_UMT5 = f"{_ATTENTION.format(1)}.{_BIAS}"

_WAN_BLOCK: Final = re.compile(r"^blocks\.(\d{1,4})\.(.+)$")
_WAN_PARTS: Final = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in ("q", "k", "v", "o")},
}
"""The layers of a block in Wan's own files, and in transformers."""
_WAN_OTHERS: Final = {"token_embedding.weight": _TOKENS, "norm.weight": "encoder.final_layer_norm.weight"}
_OF_WAN: Final = "blocks.1.pos_embedding.embedding.weight"


@dataclass(frozen=True, slots=True)
class T5Config:
    """The sizes of an encoder; ``inner`` is the width of its feed-forward layers.

    ``has_tables``: every block has a table of relative positions, as in UMT5; else the first one's is that of all.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    has_tables: bool = False

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
    has_tables = False
    """Whether every block has a table of relative positions."""

    def claims(self, names: Collection[str]) -> bool:
        return any(map(_BLOCK.match, names)) and _OF_UMT5 not in names

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> T5Config:
        if f"{_FEED_FORWARD.format(0)}.wi.weight" in shapes:
            raise Unsupported(f"{self.name}: its feed-forward layers have no gate (wi): this is T5 1.0; lend T5 v1.1")
        vocabulary, width = matrix(self.name, shapes, _TOKENS)
        return T5Config(
            vocabulary=vocabulary,
            width=width,
            layers=count_blocks(self.name, shapes, "encoder.block", MAX_LAYERS),
            heads=matrix(self.name, shapes, f"{_ATTENTION.format(0)}.{_BIAS}")[1],
            inner=matrix(self.name, shapes, f"{_FEED_FORWARD.format(0)}.wi_0.weight")[0],
            has_tables=self.has_tables,
        )

    def entries(self, config: T5Config, names: Collection[str]) -> Iterator[Entry]:
        width, attended = config.width, config.heads * HEAD_SIZE
        yield tensor_entry(_TOKENS, (config.vocabulary, width))
        for number in range(config.layers):
            attention, feed_forward = _ATTENTION.format(number), _FEED_FORWARD.format(number)
            for part in ("q", "k", "v"):
                yield tensor_entry(f"{attention}.{part}.weight", (attended, width))
            yield tensor_entry(f"{attention}.o.weight", (width, attended))
            if number == 0 or config.has_tables:
                yield tensor_entry(f"{attention}.{_BIAS}", (BUCKETS, config.heads))
            yield tensor_entry(f"encoder.block.{number}.layer.0.layer_norm.weight", (width,))
            for part in ("wi_0", "wi_1"):
                yield tensor_entry(f"{feed_forward}.{part}.weight", (config.inner, width))
            yield tensor_entry(f"{feed_forward}.wo.weight", (width, config.inner))
            yield tensor_entry(f"encoder.block.{number}.layer.1.layer_norm.weight", (width,))
        yield tensor_entry("encoder.final_layer_norm.weight", (width,))

    @property
    def smallest(self) -> T5Config:
        return T5Config(
            vocabulary=HEAD_SIZE, width=HEAD_SIZE, layers=1, heads=1, inner=HEAD_SIZE, has_tables=self.has_tables
        )

    def lora_entries(self, config: T5Config) -> Iterator[Entry]:
        yield from self.entries(config, ())

    def heads(self, config: T5Config) -> int:
        return 0

    @property
    def operations(self) -> T5Operations:
        return T5Operations()


class UMT5(T5):
    """The family of UMT5: see the module's docstring."""

    name = "umt5"
    title = "UMT5 of Wan (umt5_xxl_fp16.safetensors)"
    has_tables = True

    def claims(self, names: Collection[str]) -> bool:
        return _OF_UMT5 in names or _OF_WAN in names

    def canonical(self, name: str) -> str:
        if name in _WAN_OTHERS:
            return _WAN_OTHERS[name]
        found = _WAN_BLOCK.match(name)
        layer, _, part = found[2].rpartition(".") if found else ("", "", "")
        if found is None or layer not in _WAN_PARTS:
            return name
        return f"encoder.block.{int(found[1])}.{_WAN_PARTS[layer]}.{part}"

    @property
    def operations(self) -> UMT5Operations:
        return UMT5Operations()


class T5Operations:
    """See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`."""

    def build(self, config: T5Config) -> torch.nn.Module:
        from transformers import T5Config as TransformersT5Config
        from transformers import T5EncoderModel, UMT5EncoderModel
        from transformers import UMT5Config as TransformersUMT5Config

        given: dict[str, Any] = {
            "vocab_size": config.vocabulary,
            "d_model": config.width,
            "d_kv": HEAD_SIZE,
            "d_ff": config.inner,
            "num_layers": config.layers,
            "num_heads": config.heads,
            "relative_attention_num_buckets": BUCKETS,
            "relative_attention_max_distance": MAX_DISTANCE,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "use_cache": False,
        }
        model: Any
        if config.has_tables:
            model = UMT5EncoderModel(TransformersUMT5Config(**given))
        else:
            model = T5EncoderModel(TransformersT5Config(**given))
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
        return cast(torch.Tensor, model.module(inputs_embeds=_looked_up(model, token_ids)).last_hidden_state), None


class UMT5Operations(T5Operations):
    """As :class:`T5Operations`, with masks: the states of padding are zero, as Wan was trained."""

    def facts(self, config: T5Config) -> TextEncoderFacts:
        return TextEncoderFacts(
            width=config.width, max_tokens=config.max_tokens, has_pooled=False, layers=config.layers
        )

    @torch.inference_mode()
    def encode(
        self,
        model: Model[T5Config],
        token_ids: torch.Tensor,
        *,
        pooled: bool,
        mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if mask is not None:
            mask = mask.to(model.device)
        found = model.module(
            inputs_embeds=_looked_up(model, token_ids), attention_mask=mask, output_hidden_states=bool(layers)
        )
        states = torch.cat([found.hidden_states[each] for each in layers], -1) if layers else found.last_hidden_state
        return states if mask is None else states.masked_fill(mask.unsqueeze(-1) == 0, 0.0), None


def _looked_up(model: Model[T5Config], token_ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of tokens, (batch, tokens, width)."""
    table = model.module.get_submodule("shared")
    states = table(token_ids.to(model.device))
    if isinstance(table, PackedEmbedding) and table.packed.format == "float8" and table.packed.scale is None:
        states = torch.nan_to_num(states)  # files in plain fp8 have NaN in rows of their table; so does ComfyUI
    return cast(torch.Tensor, states)
