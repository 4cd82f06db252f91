"""The FLUX.1 transformer (dev, schnell, Kontext, Fill, Canny, Depth), in the naming of Black Forest Labs and ComfyUI,
and in that of diffusers, whose files have query, key, value and the MLP's input as tensors of their own.

Names of query and key norms end in ``.scale`` (files) or ``.weight`` (newer ComfyUI modules). Only dev has
``guidance_in``. Everything else is read from shapes.

Source: diffusers, ``convert_flux_transformer_checkpoint_to_diffusers``; a test compares every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from xditd.gpu_workers.families.flux1.config import (
    CONTROL_CHANNELS,
    FILL_CHANNELS,
    HEAD_SIZE,
    HIDDEN,
    MLP_RATIO,
    MODULATIONS_DOUBLE,
    MODULATIONS_SINGLE,
    PACKED_CHANNELS,
    TIMESTEP_CHANNELS,
    Flux1Config,
)
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.operations import Flux1Operations

MAX_BLOCKS = 256
KNOWN_INPUTS = {
    PACKED_CHANNELS: "dev, schnell, Kontext",
    CONTROL_CHANNELS: "Canny, Depth",
    FILL_CHANNELS: "Fill",
}

NORM_ALIAS = re.compile(r"(\.(?:query|key)_norm)\.weight$")
_MARKS = re.compile(r"^(double_blocks\.\d+\.img_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$")
# Prefixes of other models whose names match _MARKS: FLUX.2, FLUX.3, Chroma, HunyuanVideo, ControlNets.
_FOREIGN = (
    "double_stream_modulation_img.",
    "early_stream_modulations.",
    "distilled_guidance_layer.",
    "txt_in.individual_token_refiner.",
    "controlnet_blocks.",
)


_DIFFUSERS = ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight")
_FOREIGN_IN_DIFFUSERS = ("controlnet_", "distilled_guidance_layer.", "input_hint_block.")
_NAMES = {
    True: {
        "double": "double_blocks",
        "single": "single_blocks",
        "image": "img_in",
        "text": "txt_in",
        "time": "time_in.out_layer",
        "pooled": "vector_in.in_layer",
        "guidance": "guidance_in.",
        "double_out": "img_attn.proj",
        "single_out": "linear2",
        "output": "final_layer.linear",
        "last": "final_layer",
    },
    False: {
        "double": "transformer_blocks",
        "single": "single_transformer_blocks",
        "image": "x_embedder",
        "text": "context_embedder",
        "time": "time_text_embed.timestep_embedder.linear_2",
        "pooled": "time_text_embed.text_embedder.linear_1",
        "guidance": "time_text_embed.guidance_embedder.",
        "double_out": "attn.to_out.0",
        "single_out": "proj_out",
        "output": "proj_out",
        "last": "proj_out",
    },
}
"""Layers that show sizes, in original files and in diffusers'."""


class Flux1:
    """The family of FLUX.1: see the module's docstring."""

    name = "flux1"
    title = "FLUX.1 (flux1-dev.safetensors)"
    kind: Kind = "transformer"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = (HIDDEN,)
    swapped_halves = frozenset({"norm_out.linear"})

    def claims(self, names: Collection[str]) -> bool:
        bare = [self.canonical(name) for name in names]
        if any(map(_MARKS.match, bare)):
            return not any(name.startswith(_FOREIGN) for name in bare)
        return _is_diffusers(bare)

    def canonical(self, name: str) -> str:
        return NORM_ALIAS.sub(r"\1.scale", name)

    def configure(self, shapes: Mapping[str, Shape]) -> Flux1Config:
        is_original = not _is_diffusers(shapes)
        names = _NAMES[is_original]
        kinds = (names["double"], names["single"])
        double, single = (count_blocks(self.name, shapes, kind, MAX_BLOCKS) for kind in kinds)
        for kind, count in zip(kinds, (double, single), strict=True):
            if count == 0:
                raise BadCheckpoint(f"flux1: no tensor of {kind}.0: a FLUX.1 transformer has blocks of both kinds")
        layers = [
            *(names["image"], names["text"], names["time"]),
            *(f"{kinds[0]}.{i}.{names['double_out']}" for i in range(double)),
            *(f"{kinds[1]}.{i}.{names['single_out']}" for i in range(single)),
        ]
        hidden = vote(self.name, "hidden size", shapes, [(f"{layer}.weight", 0) for layer in layers])
        if hidden % HEAD_SIZE:
            raise BadCheckpoint(f"flux1: hidden size {hidden} is not a multiple of the head size {HEAD_SIZE}")
        image, output = names["image"], names["output"]
        inputs = vote(self.name, "input channels", shapes, [(f"{image}.weight", 1)], PACKED_CHANNELS)
        outputs = vote(self.name, "output channels", shapes, [(f"{output}.weight", 0)], PACKED_CHANNELS)
        if inputs not in KNOWN_INPUTS or outputs != PACKED_CHANNELS:
            known = ", ".join(f"{channels} ({what})" for channels, what in KNOWN_INPUTS.items())
            raise Unsupported(
                f"flux1: {image} takes {inputs} channels and {names['last']} gives {outputs}; known inputs: {known}, "
                f"and {PACKED_CHANNELS} outputs: run another variant of FLUX.1 as its class"
            )
        return Flux1Config(
            hidden=hidden,
            double_blocks=double,
            single_blocks=single,
            context_channels=vote(self.name, "text channels", shapes, [(f"{names['text']}.weight", 1)], 4096),
            pooled_channels=vote(self.name, "pooled text channels", shapes, [(f"{names['pooled']}.weight", 1)], 768),
            has_guidance=any(name.startswith(names["guidance"]) for name in shapes),
            is_original=is_original,
            in_channels=inputs,
        )

    def entries(self, config: Flux1Config, names: Collection[str]) -> Iterator[Entry]:
        original = self._original_entries(config)
        yield from original if config.is_original else as_diffusers(original)

    def _original_entries(self, config: Flux1Config) -> Iterator[Entry]:
        h = config.hidden
        yield from layer_entries("img_in", (h, config.in_channels), "x_embedder")
        yield from layer_entries("txt_in", (h, config.context_channels), "context_embedder")
        yield from embedder("time_in", h, TIMESTEP_CHANNELS, "timestep_embedder")
        yield from embedder("vector_in", h, config.pooled_channels, "text_embedder")
        if config.has_guidance:
            yield from embedder("guidance_in", h, TIMESTEP_CHANNELS, "guidance_embedder")
        for i in range(config.double_blocks):
            yield from double_block(f"double_blocks.{i}", h, f"transformer_blocks.{i}")
        for i in range(config.single_blocks):
            yield from single_block(f"single_blocks.{i}", h, f"single_transformer_blocks.{i}")
        # Checkpoints order this projection (shift, scale), diffusers (scale, shift). The module's norm_out reads it in
        # checkpoint order (models/checkpoint_order.py), so nothing is copied.
        yield from layer_entries("final_layer.adaLN_modulation.1", (2 * h, h), "norm_out.linear")
        yield from layer_entries("final_layer.linear", (PACKED_CHANNELS, h), "proj_out")

    @property
    def smallest(self) -> Flux1Config:
        return Flux1Config(
            hidden=HEAD_SIZE,
            double_blocks=1,
            single_blocks=1,
            context_channels=4096,
            pooled_channels=768,
            has_guidance=True,
        )

    def lora_entries(self, config: Flux1Config) -> Iterator[Entry]:
        # The last modulation has one order in the module: LoRAs that name it in the other order are not of it, but for
        # those in diffusers' naming on an original file, whose halves ``swapped_halves`` moves.
        for entry in self._original_entries(config):
            if config.is_original or not entry.targets[0][0].startswith("norm_out."):
                yield entry
            else:
                yield from as_diffusers(iter([entry]))
        yield from xlabs_entries(config)

    def heads(self, config: Flux1Config) -> int:
        return config.heads

    @property
    def operations(self) -> Flux1Operations:
        # xfuser needs the GPU and the process group when it is imported, so not at the top of this module.
        from xditd.gpu_workers.families.flux1.operations import Flux1Operations

        return Flux1Operations()


def _is_diffusers(names: Collection[str]) -> bool:
    has_foreign = any(name.startswith(_FOREIGN_IN_DIFFUSERS) for name in names)
    return all(mark in names for mark in _DIFFUSERS) and not has_foreign


def as_diffusers(entries: Iterator[Entry]) -> Iterator[Entry]:
    """List the same parameters as tensors of their own names."""
    for entry in entries:
        for target, rows in entry.targets:
            yield tensor_entry(target, (rows, *entry.shape[1:]))


def xlabs_entries(config: Flux1Config) -> Iterator[Entry]:
    """List the layers that LoRAs of XLabs change: those of attention, by the names of their processors.

    Source: XLabs-AI/x-flux, ``DoubleStreamBlockLoraProcessor`` and ``SingleStreamBlockLoraProcessor``.
    """
    h, mlp = config.hidden, MLP_RATIO * config.hidden
    for i in range(config.double_blocks):
        for number, qkv, projection in (
            (1, ("to_q", "to_k", "to_v"), "to_out.0"),
            (2, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
        ):
            source, target = f"double_blocks.{i}.processor", f"transformer_blocks.{i}.attn"
            parts = [f"{target}.{part}.weight" for part in qkv]
            yield tensor_entry(f"{source}.qkv_lora{number}.weight", (3 * h, h), *parts)
            yield tensor_entry(f"{source}.proj_lora{number}.weight", (h, h), f"{target}.{projection}.weight")
    for i in range(config.single_blocks):
        source, target = f"single_blocks.{i}.processor", f"single_transformer_blocks.{i}"
        parts = [f"{target}.attn.{part}.weight" for part in ("to_q", "to_k", "to_v")]
        yield tensor_entry(f"{source}.qkv_lora.weight", (3 * h, h), *parts)
        yield tensor_entry(f"{source}.proj_lora.weight", (h, h + mlp), f"{target}.proj_out.weight")


def embedder(source: str, hidden: int, channels: int, target: str) -> Iterator[Entry]:
    yield from layer_entries(f"{source}.in_layer", (hidden, channels), f"time_text_embed.{target}.linear_1")
    yield from layer_entries(f"{source}.out_layer", (hidden, hidden), f"time_text_embed.{target}.linear_2")


def _norms(source: str, target: str, query: str, key: str) -> Iterator[Entry]:
    yield tensor_entry(f"{source}.query_norm.scale", (HEAD_SIZE,), f"{target}.{query}.weight")
    yield tensor_entry(f"{source}.key_norm.scale", (HEAD_SIZE,), f"{target}.{key}.weight")


def double_block(source: str, h: int, target: str) -> Iterator[Entry]:
    attention = f"{target}.attn"
    for stream, qkv, norms, projection, modulation, mlp in (
        ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
        (
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "norm1_context",
            "ff_context",
        ),
    ):
        yield from layer_entries(
            f"{source}.{stream}_mod.lin", (MODULATIONS_DOUBLE * h, h), f"{target}.{modulation}.linear"
        )
        yield from layer_entries(f"{source}.{stream}_attn.qkv", (3 * h, h), *(f"{attention}.{part}" for part in qkv))
        yield from _norms(f"{source}.{stream}_attn.norm", attention, *norms)
        yield from layer_entries(f"{source}.{stream}_attn.proj", (h, h), f"{attention}.{projection}")
        yield from layer_entries(f"{source}.{stream}_mlp.0", (MLP_RATIO * h, h), f"{target}.{mlp}.net.0.proj")
        yield from layer_entries(f"{source}.{stream}_mlp.2", (h, MLP_RATIO * h), f"{target}.{mlp}.net.2")


def single_block(source: str, h: int, target: str) -> Iterator[Entry]:
    mlp = MLP_RATIO * h
    yield from layer_entries(f"{source}.modulation.lin", (MODULATIONS_SINGLE * h, h), f"{target}.norm.linear")
    yield from layer_entries(
        f"{source}.linear1",
        (3 * h + mlp, h),
        *(f"{target}.attn.{part}" for part in ("to_q", "to_k", "to_v")),
        f"{target}.proj_mlp",
        rows=(h, h, h, mlp),
    )
    yield from _norms(f"{source}.norm", f"{target}.attn", "norm_q", "norm_k")
    yield from layer_entries(f"{source}.linear2", (h, h + mlp), f"{target}.proj_out")
