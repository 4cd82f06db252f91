"""The transformers of Wan 2.1, 2.2 and VACE, in the naming of the original and ComfyUI's files, and in diffusers'.

Every tensor is one parameter, renamed. The norms of a block have other numbers in both: the original's ``norm3`` is
diffusers' ``norm2``. Everything is read from shapes but the head size, which all released models share.

Source: diffusers, ``convert_wan_transformer_to_diffusers``; a test compares every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.wan.config import (
    CONTROL_CHANNELS,
    HEAD_SIZE,
    IMAGE_TOKENS,
    MODULATIONS,
    OUT_CHANNELS,
    PATCH,
    WanConfig,
    WanVaceConfig,
)
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.wan.operations import WanOperations
    from xditd.gpu_workers.families.wan.vace import WanVaceOperations

MAX_BLOCKS: Final = 256

_ORIGINAL: Final = "head.modulation"
_DIFFUSERS: Final = ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight")
_PLAIN: Final = "lend Wan 2.1 or 2.2 for text or a first image, or run another as its class of diffusers (as_class)"

_OTHERS: Final = (
    ("control_adapter.", "Wan with a camera's path"),
    ("casual_audio_encoder.", "Wan S2V"),
    ("audio_proj.", "HuMo"),
    ("face_adapter.", "Wan Animate"),
    ("motion_encoder.", "Wan Animate"),
    ("patch_embedding_", "SCAIL or WanDancer"),
    ("ref_conv.", "Wan Fun with a reference image"),
    ("fps_embedding.", "SkyReels with diffusion forcing"),
)
"""Beginnings of names that only relatives have, which do more than this family runs."""

_LAYERS: Final = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
)
"""The layers outside of blocks: their names in original files, and in diffusers'."""

_IMAGE_LAYERS: Final = (
    ("img_emb.proj.0", "norm1"),
    ("img_emb.proj.1", "ff.net.0.proj"),
    ("img_emb.proj.3", "ff.net.2"),
    ("img_emb.proj.4", "norm2"),
)
_IMAGE_PARTS: Final = ("img_emb.", "condition_embedder.image_embedder.")
_IMAGE_KEYS: Final = re.compile(r"\.(?:k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k)\.")
"""Tensors that only models with CLIP's vision model have, in both namings."""
_POSITIONS: Final = ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")
"""Of the tokens of a first and a last image, in both namings."""
_PLAIN_CHANNELS: Final = 16
_CONTROL: Final = "vace_"
"""How names begin that VACE alone has."""
_CONTROL_PATCHES: Final = "vace_patch_embedding"
_CONTROL_BLOCKS: Final = "vace_blocks"
_CONTROL_LAYERS: Final = (("before_proj", "proj_in"), ("after_proj", "proj_out"))
"""Of control blocks, in both namings; the first block alone has the first."""
_ATTENTIONS: Final = (("self_attn", "attn1"), ("cross_attn", "attn2"))
_PROJECTIONS: Final = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))


class Wan:
    """The family of Wan: see the module's docstring."""

    name = "wan"
    title = "Wan 2.1 or 2.2 (wan2.2_t2v_high_noise_14B_fp16.safetensors)"
    kind: Kind = "transformer"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()
    swapped_halves: frozenset[str] = frozenset()

    def claims(self, names: Collection[str]) -> bool:
        return _is_wan(names) and not has_control(names)

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> WanConfig:
        for beginning, model in _OTHERS:
            if found := min((name for name in shapes if name.startswith(beginning)), default=None):
                raise Unsupported(
                    f"{self.name}: {found} is a tensor of {model}, which this family does not run; {_PLAIN}"
                )
        is_original = _ORIGINAL in shapes
        blocks = count_blocks(self.name, shapes, "blocks", MAX_BLOCKS)
        if blocks == 0:
            raise BadCheckpoint(f"{self.name}: no tensor of blocks.0: a Wan transformer has blocks")
        names = {original: original if is_original else other for original, other in _LAYERS}
        own, cross = (pair[0] if is_original else pair[1] for pair in _ATTENTIONS)
        query, first = ("q", "ffn.0") if is_original else ("to_q", "ffn.net.0.proj")
        each = [f"blocks.{i}" for i in range(blocks)]
        wide = [
            *(f"{names[layer]}.weight" for layer in ("patch_embedding", "text_embedding.2", "time_embedding.2")),
            *(f"{block}.{attention}.{query}.weight" for block in each for attention in (own, cross)),
        ]
        hidden = vote(self.name, "hidden size", shapes, [(name, 0) for name in wide])
        if hidden % HEAD_SIZE:
            raise Unsupported(f"{self.name}: {hidden} channels are no multiple of its heads' {HEAD_SIZE}; {_PLAIN}")
        channels = vote(self.name, "input channels", shapes, [(f"{names['patch_embedding']}.weight", 1)])
        patch = PATCH[0] * PATCH[1] * PATCH[2]
        out = vote(self.name, "output channels", shapes, [(f"{names['head.head']}.{part}", 0) for part in _PARTS])
        if OUT_CHANNELS.get(channels) != out // patch:
            raise Unsupported(
                f"{self.name}: {channels} channels to {out // patch}: known are 16 to 16 (text), 36 to 16 (a first "
                f"image) and 48 to 48 (TI2V); {_PLAIN}"
            )
        of_image = [name for name in shapes if name.startswith(_IMAGE_PARTS) or _IMAGE_KEYS.search(name)]
        if of_image and channels == out // patch:
            raise BadCheckpoint(
                f"{self.name}: {min(of_image)} is a tensor of Wan 2.1 for a first image, but this transformer reads "
                f"{channels} channels, those of text alone: the file mixes two models"
            )
        image = _IMAGE_LAYERS[0][0] if is_original else "condition_embedder.image_embedder.norm1"
        return WanConfig(
            hidden=hidden,
            blocks=blocks,
            ffn=vote(self.name, "feed-forward size", shapes, [(f"{block}.{first}.weight", 0) for block in each]),
            in_channels=channels,
            out_channels=out // patch,
            text_channels=vote(self.name, "text channels", shapes, [(f"{names['text_embedding.0']}.weight", 1)]),
            time_channels=vote(self.name, "time channels", shapes, [(f"{names['time_embedding.0']}.weight", 1)]),
            image_channels=vote(self.name, "image channels", shapes, [(f"{image}.{part}", 0) for part in _PARTS])
            if of_image
            else 0,
            has_image_positions=_POSITIONS[0 if is_original else 1] in shapes,
            is_original=is_original,
        )

    def entries(self, config: WanConfig, names: Collection[str]) -> Iterator[Entry]:
        yield from self.entries_in(config, is_original=config.is_original)

    def entries_in(self, config: WanConfig, *, is_original: bool) -> Iterator[Entry]:
        """List the tensors in one of the two namings."""
        yield from _entries(config, is_original=is_original)

    @property
    def smallest(self) -> WanConfig:
        return WanConfig(hidden=HEAD_SIZE, blocks=1, ffn=HEAD_SIZE, image_channels=HEAD_SIZE)

    def lora_entries(self, config: WanConfig) -> Iterator[Entry]:
        # Both namings have the layers outside of blocks and the parameters that are spelled alike: those once.
        seen: set[str] = set()
        for is_original in (config.is_original, not config.is_original):
            for entry in self.entries_in(config, is_original=is_original):
                if entry.source not in seen and not _NORM.search(entry.source):
                    seen.add(entry.source)
                    yield entry

    def heads(self, config: WanConfig) -> int:
        return config.heads

    @cached_property
    def operations(self) -> WanOperations:
        # Imports diffusers and xfuser, so not at the top of this module.
        from xditd.gpu_workers.families.wan.operations import WanOperations

        return WanOperations()


class WanVace(Wan):
    """The family of Wan VACE: a Wan transformer whose control blocks read a control video, masks and references."""

    name = "wan_vace"
    title = "Wan VACE (wan2.1_vace_14B_fp16.safetensors)"

    def claims(self, names: Collection[str]) -> bool:
        return _is_wan(names) and has_control(names)

    def configure(self, shapes: Mapping[str, Shape]) -> WanVaceConfig:
        found = super().configure({name: shape for name, shape in shapes.items() if not name.startswith(_CONTROL)})
        if found.in_channels != _PLAIN_CHANNELS or found.image_channels:
            raise Unsupported(
                f"{self.name}: control blocks of a transformer of {found.in_channels} channels, or with CLIP's vision "
                f"model; known is one of {_PLAIN_CHANNELS}, for text; {_PLAIN}"
            )
        blocks = count_blocks(self.name, shapes, _CONTROL_BLOCKS, MAX_BLOCKS)
        if blocks == 0 or found.blocks % blocks:
            raise BadCheckpoint(
                f"{self.name}: {blocks} control blocks ({_CONTROL_BLOCKS}) beside {found.blocks} blocks, whose number "
                "they have to divide"
            )
        name = f"{_CONTROL_PATCHES}.weight"
        channels = vote(self.name, "control channels", shapes, [(name, 1)], CONTROL_CHANNELS)
        if channels != CONTROL_CHANNELS:
            raise Unsupported(f"{self.name}: {name} reads {channels} channels, known are {CONTROL_CHANNELS}; {_PLAIN}")
        base = {each.name: getattr(found, each.name) for each in fields(found)}
        return WanVaceConfig(**base, control_blocks=blocks)

    def entries_in(self, config: WanConfig, *, is_original: bool) -> Iterator[Entry]:
        assert isinstance(config, WanVaceConfig)
        yield from super().entries_in(config, is_original=is_original)
        yield from layer_entries(_CONTROL_PATCHES, (config.hidden, CONTROL_CHANNELS, *PATCH), _CONTROL_PATCHES)
        for number in range(config.control_blocks):
            block = f"{_CONTROL_BLOCKS}.{number}"
            yield from _block(block, config, is_original=is_original)
            for original, target in _CONTROL_LAYERS if number == 0 else _CONTROL_LAYERS[1:]:
                source = f"{block}.{original if is_original else target}"
                yield from layer_entries(source, (config.hidden, config.hidden), f"{block}.{target}")

    @property
    def smallest(self) -> WanVaceConfig:
        return WanVaceConfig(hidden=HEAD_SIZE, blocks=1, ffn=HEAD_SIZE, control_blocks=1)

    @cached_property
    def operations(self) -> WanVaceOperations:
        from xditd.gpu_workers.families.wan.vace import WanVaceOperations

        return WanVaceOperations()


def _is_wan(names: Collection[str]) -> bool:
    return _ORIGINAL in names or all(name in names for name in _DIFFUSERS)


def has_control(names: Collection[str]) -> bool:
    """Return whether these are tensors of VACE, complete or not."""
    return any(name.startswith(_CONTROL) for name in names)


_PARTS: Final = ("weight", "bias")
_NORM: Final = re.compile(
    r"norm\d?\.|(?:^|\.)(?:modulation|scale_shift_table|emb_pos|pos_embed)$|img_emb\.proj\.[04]\."
)
"""What LoRAs do not change, and what is spelled alike in both namings with another meaning (``norm3``)."""


def _entries(config: WanConfig, *, is_original: bool) -> Iterator[Entry]:
    h = config.hidden
    patch = PATCH[0] * PATCH[1] * PATCH[2]
    shapes: dict[str, Shape] = {
        "patch_embedding": (h, config.in_channels, *PATCH),
        "text_embedding.0": (h, config.text_channels),
        "time_embedding.0": (h, config.time_channels),
        "time_projection.1": (MODULATIONS * h, h),
        "head.head": (config.out_channels * patch, h),
    }
    for original, target in _LAYERS:
        yield from layer_entries(original if is_original else target, shapes.get(original, (h, h)), target)
    yield tensor_entry(_ORIGINAL if is_original else "scale_shift_table", (1, 2, h), "scale_shift_table")
    if config.image_channels:
        c = config.image_channels
        for (original, target), shape in zip(_IMAGE_LAYERS, ((c,), (c, c), (h, c), (h,)), strict=True):
            full = f"condition_embedder.image_embedder.{target}"
            yield from layer_entries(original if is_original else full, shape, full)
    if config.has_image_positions:
        source = _POSITIONS[0 if is_original else 1]
        yield tensor_entry(source, (1, config.images * IMAGE_TOKENS, config.image_channels), _POSITIONS[1])
    for i in range(config.blocks):
        yield from _block(f"blocks.{i}", config, is_original=is_original)


def _block(block: str, config: WanConfig, *, is_original: bool) -> Iterator[Entry]:
    h = config.hidden

    def named(original: str, target: str) -> str:
        return f"{block}.{original if is_original else target}"

    modulation = f"{block}.scale_shift_table"
    yield tensor_entry(named("modulation", "scale_shift_table"), (1, MODULATIONS, h), modulation)
    for attention, to in _ATTENTIONS:
        for name, target in _PROJECTIONS:
            source = named(f"{attention}.{name}", f"{to}.{target}")
            yield from layer_entries(source, (h, h), f"{block}.{to}.{target}")
        for norm in ("norm_q", "norm_k"):
            yield tensor_entry(
                named(f"{attention}.{norm}.weight", f"{to}.{norm}.weight"), (h,), f"{block}.{to}.{norm}.weight"
            )
    if config.image_channels:
        for name, target in (("k_img", "add_k_proj"), ("v_img", "add_v_proj")):
            yield from layer_entries(named(f"cross_attn.{name}", f"attn2.{target}"), (h, h), f"{block}.attn2.{target}")
        norm = f"{block}.attn2.norm_added_k.weight"
        yield tensor_entry(named("cross_attn.norm_k_img.weight", "attn2.norm_added_k.weight"), (h,), norm)
    yield from layer_entries(named("norm3", "norm2"), (h,), f"{block}.norm2")
    for name, target, shape in (("ffn.0", "ffn.net.0.proj", (config.ffn, h)), ("ffn.2", "ffn.net.2", (h, config.ffn))):
        yield from layer_entries(named(name, target), shape, f"{block}.{target}")
