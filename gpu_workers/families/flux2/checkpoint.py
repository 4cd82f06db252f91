"""The FLUX.2 transformer, dev and klein, in the naming of Black Forest Labs and ComfyUI, and in that of diffusers.

Query, key and value of double blocks are one tensor in the original files (``img_attn.qkv``), three in diffusers'.
Names of query and key norms end in ``.scale`` (files) or ``.weight`` (newer ComfyUI modules). Everything is read from
shapes but the axes of the rotary embedding, which follow from the head size of the released models.

Source: diffusers, ``convert_flux2_transformer_checkpoint_to_diffusers``; a test compares every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.flux2.config import (
    CHANNELS,
    HEAD_SIZE,
    MODULATIONS_DOUBLE,
    MODULATIONS_SINGLE,
    TIMESTEP_CHANNELS,
    Flux2Config,
)
from xditd.gpu_workers.models.entries import Entry, Shape, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux2.operations import Flux2Operations

MAX_BLOCKS: Final = 256

_NORM_ALIAS: Final = re.compile(r"^((?:double|single)_blocks\.\d+\..*(?:query|key)_norm)\.weight$")
_ORIGINAL: Final = "double_stream_modulation_img.lin.weight"
_DIFFUSERS: Final = "double_stream_modulation_img.linear.weight"
_PLAIN: Final = "lend FLUX.2-dev, FLUX.2-klein or a fine-tune of them"

_LAYERS: Final = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
)
"""The layers outside of blocks: their names in original files, and in diffusers'."""


class Flux2:
    """The family of FLUX.2: see the module's docstring."""

    name = "flux2"
    title = "FLUX.2 dev or klein (flux2-dev.safetensors)"
    kind: Kind = "transformer"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()
    swapped_halves = frozenset({"norm_out.linear"})

    def claims(self, names: Collection[str]) -> bool:
        return _ORIGINAL in names or _DIFFUSERS in names

    def canonical(self, name: str) -> str:
        return _NORM_ALIAS.sub(r"\1.scale", name)

    def configure(self, shapes: Mapping[str, Shape]) -> Flux2Config:
        is_original = _is_original(shapes)
        kinds = (
            ("double_blocks", "single_blocks") if is_original else ("transformer_blocks", "single_transformer_blocks")
        )
        double, single = (count_blocks(self.name, shapes, kind, MAX_BLOCKS) for kind in kinds)
        for kind, count in zip(kinds, (double, single), strict=True):
            if count == 0:
                raise BadCheckpoint(f"flux2: no tensor of {kind}.0: a FLUX.2 transformer has blocks of both kinds")
        names = {original: original if is_original else other for original, other in _LAYERS}
        projection, norm = (
            ("img_attn.proj", "img_attn.norm.query_norm.scale")
            if is_original
            else (
                "attn.to_out.0",
                "attn.norm_q.weight",
            )
        )
        wide = [
            *(names[layer] for layer in ("img_in", "txt_in", "time_in.out_layer")),
            *(f"{kinds[0]}.{i}.{projection}" for i in range(double)),
            *(f"{kinds[1]}.{i}.{'linear2' if is_original else 'attn.to_out'}" for i in range(single)),
        ]
        hidden = vote(self.name, "hidden size", shapes, [(f"{layer}.weight", 0) for layer in wide])
        head = vote(self.name, "head size", shapes, [(f"{kinds[0]}.{i}.{norm}", 0) for i in range(double)], HEAD_SIZE)
        if head != HEAD_SIZE or hidden % HEAD_SIZE:
            raise Unsupported(
                f"flux2: {hidden} channels in heads of {head}: the axes of its rotary embedding are known for heads "
                f"of {HEAD_SIZE} alone; {_PLAIN}"
            )
        image, out = names["img_in"], names["final_layer.linear"]
        channels = vote(self.name, "input channels", shapes, [(f"{image}.weight", 1), (f"{out}.weight", 0)], CHANNELS)
        if channels != CHANNELS:
            raise Unsupported(f"flux2: {image} takes {channels} channels, not {CHANNELS}: {_PLAIN}")
        guidance = names["guidance_in.in_layer"].rpartition(".")[0]
        return Flux2Config(
            hidden=hidden,
            double_blocks=double,
            single_blocks=single,
            context_channels=vote(self.name, "text channels", shapes, [(f"{names['txt_in']}.weight", 1)]),
            has_guidance=any(name.startswith(f"{guidance}.") for name in shapes),
            is_original=is_original,
        )

    def entries(self, config: Flux2Config, names: Collection[str]) -> Iterator[Entry]:
        yield from _entries(config, is_original=config.is_original)

    @property
    def smallest(self) -> Flux2Config:
        return Flux2Config(hidden=HEAD_SIZE, double_blocks=1, single_blocks=1, context_channels=7680, has_guidance=True)

    def lora_entries(self, config: Flux2Config) -> Iterator[Entry]:
        # The last modulation has one order in the module: LoRAs that name it in the other order are not of it, but for
        # those in diffusers' naming on an original file, whose halves ``swapped_halves`` moves.
        for is_original in (True, False):
            for entry in _entries(config, is_original=is_original):
                if is_original == config.is_original or entry.targets[0][0] != "norm_out.linear.weight":
                    yield entry

    def heads(self, config: Flux2Config) -> int:
        return config.heads

    @cached_property
    def operations(self) -> Flux2Operations:
        # Imports diffusers and xfuser, so not at the top of this module.
        from xditd.gpu_workers.families.flux2.operations import Flux2Operations

        return Flux2Operations()


def _is_original(names: Collection[str]) -> bool:
    return _ORIGINAL in names


def _entries(config: Flux2Config, *, is_original: bool) -> Iterator[Entry]:
    h = config.hidden
    shapes: dict[str, Shape] = {
        "img_in": (h, CHANNELS),
        "txt_in": (h, config.context_channels),
        "double_stream_modulation_img.lin": (MODULATIONS_DOUBLE * h, h),
        "double_stream_modulation_txt.lin": (MODULATIONS_DOUBLE * h, h),
        "single_stream_modulation.lin": (MODULATIONS_SINGLE * h, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
        "final_layer.linear": (CHANNELS, h),
    }
    for original, target in _LAYERS:
        if original.startswith("guidance_in.") and not config.has_guidance:
            continue
        shape = (h, TIMESTEP_CHANNELS) if original.endswith(".in_layer") else shapes.get(original, (h, h))
        yield _weight(original if is_original else target, shape, target)
    for i in range(config.double_blocks):
        source = f"double_blocks.{i}" if is_original else None
        yield from _double_block(source, config, f"transformer_blocks.{i}")
    for i in range(config.single_blocks):
        source = f"single_blocks.{i}" if is_original else None
        yield from _single_block(source, config, f"single_transformer_blocks.{i}")


def _double_block(source: str | None, config: Flux2Config, target: str) -> Iterator[Entry]:
    h, attention = config.hidden, f"{target}.attn"
    for stream, qkv, norms, projection, mlp in (
        ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        (
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "ff_context",
        ),
    ):
        parts = [f"{attention}.{part}" for part in qkv]
        if source is None:
            yield from (_weight(part, (h, h), part) for part in parts)
        else:
            yield _weight(f"{source}.{stream}_attn.qkv", (3 * h, h), *parts)
        own = None if source is None else f"{source}.{stream}_attn.norm"
        yield from _norms(own, attention, norms)
        for name, to, shape in (
            (f"{stream}_attn.proj", f"attn.{projection}", (h, h)),
            (f"{stream}_mlp.0", f"{mlp}.linear_in", (2 * config.mlp, h)),
            (f"{stream}_mlp.2", f"{mlp}.linear_out", (h, config.mlp)),
        ):
            yield _weight(f"{target}.{to}" if source is None else f"{source}.{name}", shape, f"{target}.{to}")


def _single_block(source: str | None, config: Flux2Config, target: str) -> Iterator[Entry]:
    h, attention = config.hidden, f"{target}.attn"
    for name, to, shape in (
        ("linear1", "to_qkv_mlp_proj", (3 * h + 2 * config.mlp, h)),
        ("linear2", "to_out", (h, h + config.mlp)),
    ):
        yield _weight(f"{attention}.{to}" if source is None else f"{source}.{name}", shape, f"{attention}.{to}")
    yield from _norms(None if source is None else f"{source}.norm", attention, ("norm_q", "norm_k"))


def _norms(source: str | None, attention: str, targets: tuple[str, str]) -> Iterator[Entry]:
    for name, target in zip(("query_norm", "key_norm"), targets, strict=True):
        parameter = f"{attention}.{target}.weight"
        yield tensor_entry(parameter if source is None else f"{source}.{name}.scale", (HEAD_SIZE,), parameter)


def _weight(source: str, shape: Shape, *targets: str) -> Entry:
    return tensor_entry(f"{source}.weight", shape, *(f"{target}.weight" for target in targets))
