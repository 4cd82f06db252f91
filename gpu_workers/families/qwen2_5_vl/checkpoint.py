"""Qwen2.5-VL (``qwen_2.5_vl_7b.safetensors``), in the names of transformers and ComfyUI.

Its language head is not read. A checkpoint without a vision tower encodes texts alone. Everything is read from shapes
but what ``config.py`` has, which is the same in the released models.

Source: transformers, ``Qwen2_5_VLModel``; Qwen/Qwen2.5-VL-7B-Instruct, ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.qwen2_5_vl.config import (
    CHANNELS,
    FRAMES,
    HEAD_SIZE,
    MERGE,
    PATCH,
    VISION_HEAD_SIZE,
    Qwen25VlConfig,
    VisionConfig,
)
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, matrix, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.qwen2_5_vl.operations import Qwen25VlOperations

MAX_LAYERS: Final = 256
SMALLEST_WIDTH: Final = 896
"""Of a relative with the same names and other heads, which no shape shows."""

_WRAPPERS: Final = re.compile(r"^(?:language_model\.model\.|language_model\.)(?=layers\.|embed_tokens\.|norm\.)")
_TOKENS: Final = "embed_tokens.weight"
_LAYER: Final = "layers.{}.{}"
_VISION: Final = "visual"
_PATCHES: Final = f"{_VISION}.patch_embed.proj.weight"
_BLOCKS: Final = f"{_VISION}.blocks"
_QWEN2: Final = f"{_BLOCKS}.0.mlp.fc1.weight"
"""Of the vision tower of Qwen2-VL, which has other layers."""


class Qwen25Vl:
    """The family of Qwen2.5-VL's language model: see the module's docstring."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL of Qwen-Image (qwen_2.5_vl_7b.safetensors)"
    kind: Kind = "text_encoder"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = re.compile(r"^(?:lm_head\.|language_model\.lm_head\.)")
    beside: re.Pattern[str] = re.compile(r"^visual\.")
    fused_widths: tuple[int, ...] = ()

    def claims(self, names: Collection[str]) -> bool:
        bare = {self.canonical(name) for name in names}
        # Qwen2 and 2.5 without images have these biases, too, and other positions; some files lack the vision tower.
        return {_TOKENS, _LAYER.format(0, "self_attn.q_proj.bias"), _LAYER.format(0, "mlp.gate_proj.weight")} <= bare

    def canonical(self, name: str) -> str:
        return _WRAPPERS.sub("", name)

    def configure(self, shapes: Mapping[str, Shape]) -> Qwen25VlConfig:
        vocabulary, width = matrix(self.name, shapes, _TOKENS)
        if width == SMALLEST_WIDTH:
            raise Unsupported(
                f"{self.name}: {width} channels: Qwen2.5 0.5B, whose heads are of 64; lend Qwen2.5-VL 7B "
                "(qwen_2.5_vl_7b.safetensors)"
            )
        layers = count_blocks(self.name, shapes, "layers", MAX_LAYERS)
        queries, keys, inner = (
            vote(self.name, f"rows of {part}", shapes, [(_LAYER.format(i, f"{part}.weight"), 0) for i in range(layers)])
            for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        )
        if queries % HEAD_SIZE or keys % HEAD_SIZE or queries % keys:
            raise BadCheckpoint(
                f"{self.name}: {queries} rows of queries and {keys} of keys are not of heads of {HEAD_SIZE}"
            )
        return Qwen25VlConfig(
            vocabulary=vocabulary,
            width=width,
            layers=layers,
            heads=queries // HEAD_SIZE,
            key_heads=keys // HEAD_SIZE,
            inner=inner,
            vision=self._vision(shapes) if any(name.startswith(f"{_VISION}.") for name in shapes) else None,
        )

    def _vision(self, shapes: Mapping[str, Shape]) -> VisionConfig:
        if _QWEN2 in shapes:
            raise Unsupported(
                f"{self.name}: a vision tower of Qwen2-VL, which has {_QWEN2}; lend Qwen2.5-VL 7B "
                "(qwen_2.5_vl_7b.safetensors), or leave out its tensors to encode texts alone"
            )
        blocks = count_blocks(self.name, shapes, _BLOCKS, MAX_LAYERS)
        numbered = [f"{_BLOCKS}.{number}" for number in range(blocks)]
        width = vote(
            self.name,
            "vision width",
            shapes,
            [(_PATCHES, 0), *((f"{block}.attn.proj.weight", 0) for block in numbered)],
        )
        if width % VISION_HEAD_SIZE:
            raise BadCheckpoint(
                f"{self.name}: {width} channels of the vision tower are not of heads of {VISION_HEAD_SIZE}"
            )
        rows = [(f"{block}.mlp.gate_proj.weight", 0) for block in numbered]
        return VisionConfig(width, blocks, vote(self.name, "vision rows of mlp.gate_proj", shapes, rows))

    def entries(self, config: Qwen25VlConfig, names: Collection[str]) -> Iterator[Entry]:
        width, queries, keys = config.width, config.heads * HEAD_SIZE, config.key_heads * HEAD_SIZE
        yield tensor_entry(_TOKENS, (config.vocabulary, width))
        for number in range(config.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield tensor_entry(_LAYER.format(number, f"{norm}.weight"), (width,))
            for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                yield from layer_entries(_LAYER.format(number, f"self_attn.{part}"), (rows, width))
            for part, shape in (
                ("self_attn.o_proj", (width, queries)),
                ("mlp.gate_proj", (config.inner, width)),
                ("mlp.up_proj", (config.inner, width)),
                ("mlp.down_proj", (width, config.inner)),
            ):
                yield tensor_entry(_LAYER.format(number, f"{part}.weight"), shape)
        yield tensor_entry("norm.weight", (width,))
        if config.vision is not None:
            yield from _vision_entries(config.vision, width)

    def heads(self, config: Qwen25VlConfig) -> int:
        return 0

    @cached_property
    def operations(self) -> Qwen25VlOperations:
        from xditd.gpu_workers.families.qwen2_5_vl.operations import Qwen25VlOperations

        return Qwen25VlOperations()


def _vision_entries(config: VisionConfig, out: int) -> Iterator[Entry]:
    width, merged = config.width, config.width * MERGE**2
    yield tensor_entry(_PATCHES, (width, CHANNELS, FRAMES, PATCH, PATCH))
    for number in range(config.blocks):
        block = f"{_BLOCKS}.{number}"
        for norm in ("norm1", "norm2"):
            yield tensor_entry(f"{block}.{norm}.weight", (width,))
        for part, shape in (
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("mlp.gate_proj", (config.inner, width)),
            ("mlp.up_proj", (config.inner, width)),
            ("mlp.down_proj", (width, config.inner)),
        ):
            yield from layer_entries(f"{block}.{part}", shape)
    yield tensor_entry(f"{_VISION}.merger.ln_q.weight", (width,))
    yield from layer_entries(f"{_VISION}.merger.mlp.0", (merged, merged))
    yield from layer_entries(f"{_VISION}.merger.mlp.2", (out, merged))
