"""Qwen-Image's transformer, of which diffusers' files and ComfyUI's have the same names.

Edit-2511 differs by one tensor without elements, with which ComfyUI marks it, or by its ``config.json``. Everything
else is read from shapes but the axes of the rotary embedding, which follow from the head size of the released models.

Source: diffusers, ``QwenImageTransformer2DModel``; a test compares every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from xditd.gpu_workers.families.qwen_image.config import (
    HEAD_SIZE,
    MODULATIONS,
    PACKED_CHANNELS,
    TIMESTEP_CHANNELS,
    QwenImageConfig,
)
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.qwen_image.operations import QwenImageOperations

MAX_BLOCKS: Final = 256
BLOCKS: Final = "transformer_blocks"
MARKER: Final = "__index_timestep_zero__"
"""ComfyUI's marker of Edit-2511: a tensor without elements."""

_MARK: Final = re.compile(r"^transformer_blocks\.\d+\.img_mod\.1\.weight$")
_PLAIN: Final = "lend Qwen-Image, Qwen-Image-Edit or a fine-tune of them"
_VARIANTS: Final = {
    "time_text_embed.addition_t_embedding.": "Qwen-Image-Layered, which makes several images at once,",
    "controlnet_": "ControlNets of Qwen-Image",
    "txt_in.text_norm.": "Qwen-Image 2.1",
}
"""Prefixes of names that only a variant has, and the variant."""


class QwenImage:
    """The family of Qwen-Image: see the module's docstring."""

    name = "qwen_image"
    title = "Qwen-Image or Qwen-Image-Edit (qwen_image_bf16.safetensors)"
    kind: Kind = "transformer"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()
    swapped_halves: frozenset[str] = frozenset()

    def claims(self, names: Collection[str]) -> bool:
        return any(map(_MARK.match, names))

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> QwenImageConfig:
        for start, variant in _VARIANTS.items():
            found = sorted(name for name in shapes if name.startswith(start))
            if found:
                raise Unsupported(f"qwen_image: {variant} are not supported: {_PLAIN}; it has {found[0]}", names=found)
        blocks = count_blocks(self.name, shapes, BLOCKS, MAX_BLOCKS)
        if not blocks:
            raise BadCheckpoint(f"qwen_image: no tensor of {BLOCKS}.0: the transformer has blocks")
        numbered = [f"{BLOCKS}.{number}" for number in range(blocks)]
        wide = ["img_in", "txt_in", *(f"{block}.attn.to_out.0" for block in numbered)]
        hidden = vote(self.name, "hidden size", shapes, [(f"{layer}.weight", 0) for layer in wide])
        head = vote(
            self.name, "head size", shapes, [(f"{block}.attn.norm_q.weight", 0) for block in numbered], HEAD_SIZE
        )
        if head != HEAD_SIZE or hidden % HEAD_SIZE:
            raise Unsupported(
                f"qwen_image: {hidden} channels in heads of {head}: the axes of its rotary embedding are known for "
                f"heads of {HEAD_SIZE} alone; {_PLAIN}"
            )
        channels = vote(self.name, "channels", shapes, [("img_in.weight", 1), ("proj_out.weight", 0)], PACKED_CHANNELS)
        if channels != PACKED_CHANNELS:
            raise Unsupported(f"qwen_image: img_in takes {channels} channels, not {PACKED_CHANNELS}: {_PLAIN}")
        return QwenImageConfig(
            hidden=hidden,
            blocks=blocks,
            text_channels=vote(self.name, "text channels", shapes, [("txt_in.weight", 1), ("txt_norm.weight", 0)]),
            has_marker=MARKER in shapes,
        )

    def with_settings(self, config: QwenImageConfig, settings: Mapping[str, Any]) -> QwenImageConfig:
        return replace(config, zero_cond_t=settings.get("zero_cond_t") is True)

    def entries(self, config: QwenImageConfig, names: Collection[str]) -> Iterator[Entry]:
        h = config.hidden
        if config.has_marker:
            yield Entry(MARKER, (0,), ())
        yield from layer_entries("img_in", (h, PACKED_CHANNELS))
        yield tensor_entry("txt_norm.weight", (config.text_channels,))
        yield from layer_entries("txt_in", (h, config.text_channels))
        time = "time_text_embed.timestep_embedder"
        yield from layer_entries(f"{time}.linear_1", (h, TIMESTEP_CHANNELS))
        yield from layer_entries(f"{time}.linear_2", (h, h))
        for number in range(config.blocks):
            yield from _block(f"{BLOCKS}.{number}", config)
        yield from layer_entries("norm_out.linear", (2 * h, h))
        yield from layer_entries("proj_out", (PACKED_CHANNELS, h))

    @property
    def smallest(self) -> QwenImageConfig:
        return QwenImageConfig(hidden=HEAD_SIZE, blocks=1, text_channels=3584)

    def lora_entries(self, config: QwenImageConfig) -> Iterator[Entry]:
        return self.entries(config, ())

    def heads(self, config: QwenImageConfig) -> int:
        return config.heads

    @cached_property
    def operations(self) -> QwenImageOperations:
        # Imports diffusers and xfuser, so not at the top of this module.
        from xditd.gpu_workers.families.qwen_image.operations import QwenImageOperations

        return QwenImageOperations()


def _block(block: str, config: QwenImageConfig) -> Iterator[Entry]:
    h, attention = config.hidden, f"{block}.attn"
    for stream in ("img", "txt"):
        yield from layer_entries(f"{block}.{stream}_mod.1", (MODULATIONS * h, h))
        yield from layer_entries(f"{block}.{stream}_mlp.net.0.proj", (config.mlp, h))
        yield from layer_entries(f"{block}.{stream}_mlp.net.2", (h, config.mlp))
    for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        yield from layer_entries(f"{attention}.{part}", (h, h))
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield tensor_entry(f"{attention}.{norm}.weight", (HEAD_SIZE,))
