"""Z-Image's checkpoints, in the naming of ComfyUI's files and in that of diffusers.

Query, key and value are one tensor in ComfyUI's files (``attention.qkv``), three in diffusers'.
Everything is read from shapes but the axes of the rotary embedding, which follow from the head size of the released
models; others are refused.

Source: diffusers, ``convert_z_image_transformer_checkpoint_to_diffusers``; a test compares every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.z_image.config import (
    HEAD_SIZE,
    PATCH_CHANNELS,
    TIME_HIDDEN,
    TIMESTEP_CHANNELS,
    ZImageConfig,
)
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.z_image.operations import ZImageOperations

MAX_BLOCKS: Final = 256
FUSED: Final = ".attention.qkv.weight"

_MARK = re.compile(r"^layers\.\d+\.adaLN_modulation\.0\.weight$")
_PLAIN: Final = "lend Z-Image-Turbo, Z-Image or a fine-tune of them"
_VARIANTS: Final = {
    "siglip_": "Z-Image Omni and Edit, which take images through SigLIP,",
    "dec_net.": "Z-Image in pixel space, which has no VAE,",
    "control_": "ControlNets of Z-Image",
    "clip_text_pooled_proj.": "relatives of Z-Image with pooled text",
}
"""Prefixes of names that only a variant has, and the variant."""


@dataclass(frozen=True, slots=True)
class _Naming:
    """The names that differ between ComfyUI's files and diffusers'."""

    patches: str
    final: str
    query_norm: str
    key_norm: str
    projection: str
    is_fused: bool


_COMFYUI: Final = _Naming("x_embedder", "final_layer", "q_norm", "k_norm", "out", is_fused=True)
_DIFFUSERS: Final = _Naming("all_x_embedder.2-1", "all_final_layer.2-1", "norm_q", "norm_k", "to_out.0", is_fused=False)


class ZImage:
    """The family of Z-Image: see the module's docstring."""

    name = "z_image"
    title = "Z-Image Turbo or Base (z_image_turbo_bf16.safetensors)"
    kind: Kind = "transformer"
    tied: Mapping[str, str] = {}
    # A norm in the released files that the model does not have.
    ignored: re.Pattern[str] | None = re.compile(r"^norm_final\.")
    fused_widths: tuple[int, ...] = ()
    swapped_halves: frozenset[str] = frozenset()

    def claims(self, names: Collection[str]) -> bool:
        return any(map(_MARK.match, names))

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> ZImageConfig:
        for start, variant in _VARIANTS.items():
            found = sorted(name for name in shapes if name.startswith(start))
            if found:
                raise Unsupported(f"z_image: {variant} are not supported: {_PLAIN}; it has {found[0]}", names=found)
        naming = _naming(shapes)
        layers = count_blocks(self.name, shapes, "layers", MAX_BLOCKS)
        refiners = max(
            count_blocks(self.name, shapes, kind, MAX_BLOCKS) for kind in ("noise_refiner", "context_refiner")
        )
        if not refiners:
            raise BadCheckpoint("z_image: no tensor of noise_refiner.0 or context_refiner.0: the transformer has both")
        blocks = [
            f"{kind}.{i}" for kind, count in (("layers", layers), ("noise_refiner", refiners)) for i in range(count)
        ]
        wide = [naming.patches, "cap_embedder.1", *(f"{block}.attention.{naming.projection}" for block in blocks)]
        hidden = vote(self.name, "hidden size", shapes, [(f"{layer}.weight", 0) for layer in wide])
        norms = [(f"{block}.attention.{naming.query_norm}.weight", 0) for block in blocks]
        head = vote(self.name, "head size", shapes, norms)
        if head != HEAD_SIZE or hidden % HEAD_SIZE:
            raise Unsupported(
                f"z_image: {hidden} channels in heads of {head}: the axes of its rotary embedding are known for "
                f"heads of {HEAD_SIZE} alone; {_PLAIN}"
            )
        _refuse_grouped(shapes, blocks, hidden, naming)
        patch = vote(self.name, "patch channels", shapes, [(f"{naming.patches}.weight", 1)], PATCH_CHANNELS)
        if patch != PATCH_CHANNELS:
            raise Unsupported(f"z_image: {naming.patches} takes {patch} channels, not {PATCH_CHANNELS}: {_PLAIN}")
        return ZImageConfig(
            hidden=hidden,
            layers=layers,
            refiners=refiners,
            text_channels=vote(self.name, "text channels", shapes, [("cap_embedder.1.weight", 1)], 2560),
        )

    def entries(self, config: ZImageConfig, names: Collection[str]) -> Iterator[Entry]:
        naming = _naming(names)
        h, time = config.hidden, config.time_channels
        yield from layer_entries(naming.patches, (h, PATCH_CHANNELS), _DIFFUSERS.patches)
        yield from layer_entries("t_embedder.mlp.0", (TIME_HIDDEN, TIMESTEP_CHANNELS))
        yield from layer_entries("t_embedder.mlp.2", (time, TIME_HIDDEN))
        yield tensor_entry("cap_embedder.0.weight", (config.text_channels,))
        yield from layer_entries("cap_embedder.1", (h, config.text_channels))
        for token in ("x_pad_token", "cap_pad_token"):
            yield tensor_entry(token, (1, h))
        for kind, count in (
            ("noise_refiner", config.refiners),
            ("context_refiner", config.refiners),
            ("layers", config.layers),
        ):
            for i in range(count):
                yield from _block(f"{kind}.{i}", config, naming, is_modulated=kind != "context_refiner")
        yield from layer_entries(f"{naming.final}.linear", (PATCH_CHANNELS, h), f"{_DIFFUSERS.final}.linear")
        yield from layer_entries(
            f"{naming.final}.adaLN_modulation.1", (h, time), f"{_DIFFUSERS.final}.adaLN_modulation.1"
        )

    @property
    def smallest(self) -> ZImageConfig:
        return ZImageConfig(hidden=HEAD_SIZE, layers=1, refiners=1, text_channels=2560)

    def lora_entries(self, config: ZImageConfig) -> Iterator[Entry]:
        yield from self.entries(config, (FUSED,))
        yield from self.entries(config, ())

    def heads(self, config: ZImageConfig) -> int:
        return config.heads

    @cached_property
    def operations(self) -> ZImageOperations:
        # Imports diffusers and xfuser, so not at the top of this module.
        from xditd.gpu_workers.families.z_image.operations import ZImageOperations

        return ZImageOperations()


def _naming(names: Collection[str]) -> _Naming:
    return _COMFYUI if any(name.endswith(FUSED) for name in names) else _DIFFUSERS


def _refuse_grouped(shapes: Mapping[str, Shape], blocks: list[str], hidden: int, naming: _Naming) -> None:
    """Raise ``Unsupported`` if most blocks have fewer key heads than query heads."""
    source, heads = ("qkv", 3 * hidden) if naming.is_fused else ("to_k", hidden)
    keys = [(f"{block}.attention.{source}.weight", 0) for block in blocks]
    rows = vote("z_image", "rows of keys", shapes, keys, heads)
    if rows < heads:
        raise Unsupported(
            f"z_image: attention.{source} has {rows} rows, not {heads}: grouped-query attention is not supported; "
            f"{_PLAIN}"
        )


def _block(source: str, config: ZImageConfig, naming: _Naming, *, is_modulated: bool) -> Iterator[Entry]:
    h, attention = config.hidden, f"{source}.attention"
    parts = [f"{attention}.{part}.weight" for part in ("to_q", "to_k", "to_v")]
    if naming.is_fused:
        yield tensor_entry(f"{attention}.qkv.weight", (3 * h, h), *parts)
    else:
        yield from (tensor_entry(part, (h, h)) for part in parts)
    for name, target, shape in (
        (naming.query_norm, _DIFFUSERS.query_norm, (HEAD_SIZE,)),
        (naming.key_norm, _DIFFUSERS.key_norm, (HEAD_SIZE,)),
        (naming.projection, _DIFFUSERS.projection, (h, h)),
    ):
        yield tensor_entry(f"{attention}.{name}.weight", shape, f"{attention}.{target}.weight")
    yield tensor_entry(f"{source}.feed_forward.w1.weight", (config.mlp, h))
    yield tensor_entry(f"{source}.feed_forward.w2.weight", (h, config.mlp))
    yield tensor_entry(f"{source}.feed_forward.w3.weight", (config.mlp, h))
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield tensor_entry(f"{source}.{norm}.weight", (h,))
    if is_modulated:
        yield from layer_entries(f"{source}.adaLN_modulation.0", (4 * h, config.time_channels))
