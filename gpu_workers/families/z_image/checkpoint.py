"""Z-Image's checkpoints, in the layout of ComfyUI's files and in diffusers'.

They differ in names, and in query, key and value: one tensor in ComfyUI's (``attention.qkv``), three in diffusers'.
Everything is read from shapes but the axes of the rotary embedding, which follow from the head size of the released
models; others are refused.

Source: diffusers, ``convert_z_image_transformer_checkpoint_to_diffusers``; a test compares every element.
"""

from __future__ import annotations

import re
from collections import Counter
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
from xditd.gpu_workers.models.family import Entry, Kind, Shape
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.z_image.operations import ZImageOperations

MAX_BLOCKS: Final = 256
FUSED: Final = ".attention.qkv.weight"

_MARK = re.compile(r"^layers\.\d+\.adaLN_modulation\.0\.weight$")
_BLOCK = re.compile(r"^(layers|noise_refiner|context_refiner)\.(\d+)\.")
_PLAIN: Final = "lend Z-Image-Turbo, Z-Image or a fine-tune of them"
_VARIANTS: Final = {
    "siglip_": "Z-Image Omni and Edit, which take images through SigLIP,",
    "dec_net.": "Z-Image in pixel space, which has no VAE,",
    "control_": "ControlNets of Z-Image",
    "clip_text_pooled_proj.": "relatives of Z-Image with pooled text",
}
"""What names that only a variant has begin with, and the variant."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How files of one kind spell what differs between them."""

    patches: str
    final: str
    query_norm: str
    key_norm: str
    projection: str
    is_fused: bool


_COMFYUI: Final = _Layout("x_embedder", "final_layer", "q_norm", "k_norm", "out", is_fused=True)
_DIFFUSERS: Final = _Layout("all_x_embedder.2-1", "all_final_layer.2-1", "norm_q", "norm_k", "to_out.0", is_fused=False)


class ZImage:
    """Z-Image: see the module's docstring."""

    name = "z_image"
    title = "Z-Image Turbo or Base (z_image_turbo_bf16.safetensors)"
    kind: Kind = "transformer"
    tied: Mapping[str, str] = {}
    # A norm of the released files that no model of the family has ever run.
    ignored: re.Pattern[str] | None = re.compile(r"^norm_final\.")

    def claims(self, names: Collection[str]) -> bool:
        return any(map(_MARK.match, names))

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> ZImageConfig:
        for start, variant in _VARIANTS.items():
            found = sorted(name for name in shapes if name.startswith(start))
            if found:
                raise Unsupported(f"z_image: {variant} are not supported: {_PLAIN}; it has {found[0]}", names=found)
        layout = _layout(shapes)
        layers = _count_blocks(shapes, "layers")
        refiners = max(_count_blocks(shapes, "noise_refiner"), _count_blocks(shapes, "context_refiner"))
        if not refiners:
            raise BadCheckpoint("z_image: no tensor of noise_refiner.0 or context_refiner.0: the transformer has both")
        blocks = [
            f"{kind}.{i}" for kind, count in (("layers", layers), ("noise_refiner", refiners)) for i in range(count)
        ]
        # Every candidate votes, so that one misshapen tensor is named by the check instead of bending the rest.
        hidden = _vote(
            "hidden size",
            [_side(shapes, f"{source}.weight", 0) for source in (layout.patches, "cap_embedder.1")]
            + [_side(shapes, f"{block}.attention.{layout.projection}.weight", 0) for block in blocks],
        )
        head = _vote(
            "head size", [_side(shapes, f"{block}.attention.{layout.query_norm}.weight", 0) for block in blocks]
        )
        if head != HEAD_SIZE or hidden % HEAD_SIZE:
            raise Unsupported(
                f"z_image: {hidden} channels in heads of {head}: the axes of its rotary embedding are known for "
                f"heads of {HEAD_SIZE} alone; {_PLAIN}"
            )
        _refuse_grouped(shapes, blocks, hidden, layout)
        patch = _vote("patch channels", [_side(shapes, f"{layout.patches}.weight", 1)], PATCH_CHANNELS)
        if patch != PATCH_CHANNELS:
            raise Unsupported(f"z_image: {layout.patches} takes {patch} channels, not {PATCH_CHANNELS}: {_PLAIN}")
        return ZImageConfig(
            hidden=hidden,
            layers=layers,
            refiners=refiners,
            text_channels=_vote("text channels", [_side(shapes, "cap_embedder.1.weight", 1)], 2560),
        )

    def entries(self, config: ZImageConfig, names: Collection[str]) -> Iterator[Entry]:
        layout = _layout(names)
        h, time = config.hidden, config.time_channels
        yield from _linear(layout.patches, h, PATCH_CHANNELS, _DIFFUSERS.patches)
        yield from _linear("t_embedder.mlp.0", TIME_HIDDEN, TIMESTEP_CHANNELS)
        yield from _linear("t_embedder.mlp.2", time, TIME_HIDDEN)
        yield _weight("cap_embedder.0", (config.text_channels,))
        yield from _linear("cap_embedder.1", h, config.text_channels)
        for token in ("x_pad_token", "cap_pad_token"):
            yield Entry(token, (1, h), ((token, 1),))
        for kind, count in (
            ("noise_refiner", config.refiners),
            ("context_refiner", config.refiners),
            ("layers", config.layers),
        ):
            for i in range(count):
                yield from _block(f"{kind}.{i}", config, layout, is_modulated=kind != "context_refiner")
        yield from _linear(f"{layout.final}.linear", PATCH_CHANNELS, h, f"{_DIFFUSERS.final}.linear")
        yield from _linear(f"{layout.final}.adaLN_modulation.1", h, time, f"{_DIFFUSERS.final}.adaLN_modulation.1")

    def heads(self, config: ZImageConfig) -> int:
        return config.heads

    @cached_property
    def operations(self) -> ZImageOperations:
        # diffusers and xfuser are not imported before the first one is lent.
        from xditd.gpu_workers.families.z_image.operations import ZImageOperations

        return ZImageOperations()


def _layout(names: Collection[str]) -> _Layout:
    return _COMFYUI if any(name.endswith(FUSED) for name in names) else _DIFFUSERS


def _count_blocks(shapes: Mapping[str, Shape], kind: str) -> int:
    numbers = [int(found[2]) for found in map(_BLOCK.match, shapes) if found and found[1] == kind]
    count = max(numbers, default=-1) + 1
    if count > MAX_BLOCKS:
        raise BadCheckpoint(f"z_image: {kind}.{count - 1} exceeds the limit of {MAX_BLOCKS} blocks")
    return count


def _refuse_grouped(shapes: Mapping[str, Shape], blocks: list[str], hidden: int, layout: _Layout) -> None:
    """Refuse keys of fewer heads than queries: most blocks have them, so that it is no single misshapen tensor."""
    source, heads = ("qkv", 3 * hidden) if layout.is_fused else ("to_k", hidden)
    rows = _vote("rows of keys", [_side(shapes, f"{block}.attention.{source}.weight", 0) for block in blocks], heads)
    if rows < heads:
        raise Unsupported(
            f"z_image: attention.{source} has {rows} rows, not {heads}: heads that share keys are not supported; "
            f"{_PLAIN}"
        )


def _side(shapes: Mapping[str, Shape], name: str, dimension: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[dimension] if len(shape) > dimension else None


def _vote(what: str, candidates: list[int | None], default: int | None = None) -> int:
    votes = Counter(side for side in candidates if side)
    if votes:
        return votes.most_common(1)[0][0]
    if default is None:
        raise BadCheckpoint(f"z_image: {what} cannot be read from any tensor: the checkpoint lacks most of its blocks")
    return default


def _weight(source: str, shape: Shape, *targets: str) -> Entry:
    """Describe a weight that fills those of ``targets``, equal parts each; one of its own name without them."""
    targets = targets or (source,)
    return Entry(f"{source}.weight", shape, tuple((f"{target}.weight", shape[0] // len(targets)) for target in targets))


def _linear(source: str, rows: int, columns: int, target: str = "") -> Iterator[Entry]:
    target = target or source
    yield _weight(source, (rows, columns), target)
    yield Entry(f"{source}.bias", (rows,), ((f"{target}.bias", rows),))


def _block(source: str, config: ZImageConfig, layout: _Layout, *, is_modulated: bool) -> Iterator[Entry]:
    h, attention = config.hidden, f"{source}.attention"
    parts = [f"{attention}.{part}" for part in ("to_q", "to_k", "to_v")]
    if layout.is_fused:
        yield _weight(f"{attention}.qkv", (3 * h, h), *parts)
    else:
        yield from (_weight(part, (h, h)) for part in parts)
    yield _weight(f"{attention}.{layout.query_norm}", (HEAD_SIZE,), f"{attention}.{_DIFFUSERS.query_norm}")
    yield _weight(f"{attention}.{layout.key_norm}", (HEAD_SIZE,), f"{attention}.{_DIFFUSERS.key_norm}")
    yield _weight(f"{attention}.{layout.projection}", (h, h), f"{attention}.{_DIFFUSERS.projection}")
    yield _weight(f"{source}.feed_forward.w1", (config.mlp, h))
    yield _weight(f"{source}.feed_forward.w2", (h, config.mlp))
    yield _weight(f"{source}.feed_forward.w3", (config.mlp, h))
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield _weight(f"{source}.{norm}", (h,))
    if is_modulated:
        yield from _linear(f"{source}.adaLN_modulation.0", 4 * h, config.time_channels)
