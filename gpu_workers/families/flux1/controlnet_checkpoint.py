"""ControlNets for FLUX.1, union and single, in the naming of diffusers and in that of ComfyUI's module.

Files of InstantX and Shakker Labs have diffusers' names (``controlnet_x_embedder``, ``transformer_blocks``), ComfyUI's
module has those of Black Forest Labs (``pos_embed_input``, ``double_blocks``). Everything is read from shapes; a union
has ``controlnet_mode_embedder``.

Sources: diffusers, ``FluxControlNetModel``; ComfyUI, ``comfy/ldm/flux/controlnet.py``; tests compare every element.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.flux1.checkpoint import (
    MAX_BLOCKS,
    NORM_ALIAS,
    as_diffusers,
    double_block,
    embedder,
    single_block,
)
from xditd.gpu_workers.families.flux1.config import HEAD_SIZE, PACKED_CHANNELS, TIMESTEP_CHANNELS
from xditd.gpu_workers.families.flux1.controlnet_config import Flux1ControlNetConfig
from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.controlnet_operations import Flux1ControlNetOperations

DOUBLE: Final = "transformer_blocks"
SINGLE: Final = "single_transformer_blocks"
"""Blocks of diffusers' class."""
MODES: Final = "controlnet_mode_embedder.weight"

_CONTROL: Final = re.compile(r"^controlnet_blocks\.")
_ORIGINAL: Final = re.compile(r"^double_blocks\.\d+\.img_attn\.")
_DIFFUSERS: Final = re.compile(r"^(transformer_blocks\.\d+\.(norm1|ff)|single_transformer_blocks\.\d+\.attn)\.")
_INPUT: Final = "controlnet_x_embedder."
_OF_PIXELS: Final = ("input_hint_block.", "input_cond_block.")
_MISTOLINE: Final = re.compile(r"^controlnet_blocks\.\d+\.linear\.")
_USUAL: Final = "lend a union or single ControlNet of InstantX or Shakker Labs"


class Flux1ControlNet:
    """The family of ControlNets for FLUX.1: see the module's docstring."""

    name = "flux1_controlnet"
    title = "a ControlNet for FLUX.1 (such as Union-Pro)"
    kind: Kind = "controlnet"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()

    def claims(self, names: Collection[str]) -> bool:
        if not any(map(_CONTROL.match, names)):
            return False
        if any(map(_ORIGINAL.match, names)):
            return True
        has_input = any(name.startswith((_INPUT, *_OF_PIXELS)) for name in names)
        return has_input and any(map(_DIFFUSERS.match, names))

    def canonical(self, name: str) -> str:
        return NORM_ALIAS.sub(r"\1.scale", name)

    def configure(self, shapes: Mapping[str, Shape]) -> Flux1ControlNetConfig:
        _refuse_others(shapes)
        is_original = any(map(_ORIGINAL.match, shapes))
        kinds = ("double_blocks", "single_blocks") if is_original else (DOUBLE, SINGLE)
        double, single = (count_blocks(self.name, shapes, kind, MAX_BLOCKS) for kind in kinds)
        if double == 0:
            raise BadCheckpoint(f"{self.name}: no tensor of {kinds[0]}.0: a ControlNet has such blocks")
        image, text, pooled = (
            ("img_in", "txt_in", "vector_in.in_layer")
            if is_original
            else ("x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1")
        )
        guidance = "guidance_in." if is_original else "time_text_embed.guidance_embedder."
        layers = [image, text, *(f"controlnet_blocks.{i}" for i in range(double))]
        layers += [f"controlnet_single_blocks.{i}" for i in range(single)]
        hidden = vote(self.name, "hidden size", shapes, [(f"{layer}.weight", 0) for layer in layers])
        if hidden % HEAD_SIZE:
            raise BadCheckpoint(f"{self.name}: hidden size {hidden} is not a multiple of the head size {HEAD_SIZE}")
        given = "pos_embed_input" if is_original else _INPUT.rstrip(".")
        inputs = vote(self.name, "picture channels", shapes, [(f"{given}.weight", 1)], PACKED_CHANNELS)
        if inputs != PACKED_CHANNELS:
            what = "with a mask (inpainting)" if inputs == PACKED_CHANNELS + 4 else "of another picture"
            raise Unsupported(
                f"{self.name}: {given} takes {inputs} channels, those {what}; known are {PACKED_CHANNELS}: {_USUAL}"
            )
        modes = vote(self.name, "modes", shapes, [(MODES, 0)]) if MODES in shapes else 0
        return Flux1ControlNetConfig(
            hidden=hidden,
            double_blocks=double,
            single_blocks=single,
            context_channels=vote(self.name, "text channels", shapes, [(f"{text}.weight", 1)], 4096),
            pooled_channels=vote(self.name, "pooled text channels", shapes, [(f"{pooled}.weight", 1)], 768),
            has_guidance=any(name.startswith(guidance) for name in shapes),
            modes=modes,
            is_original=is_original,
        )

    def entries(self, config: Flux1ControlNetConfig, names: Collection[str]) -> Iterator[Entry]:
        original = _original_entries(config)
        yield from original if config.is_original else as_diffusers(original)

    def heads(self, config: Flux1ControlNetConfig) -> int:
        return config.heads

    @property
    def operations(self) -> Flux1ControlNetOperations:
        # Imports diffusers and xfuser, so not at the top of this module.
        from xditd.gpu_workers.families.flux1.controlnet_operations import Flux1ControlNetOperations

        return Flux1ControlNetOperations()


def _refuse_others(names: Collection[str]) -> None:
    """Refuse ControlNets for FLUX.1 of another kind.

    Raises:
        Unsupported: names it.
    """
    if any(map(_MISTOLINE.match, names)) or any(name.startswith("input_cond_block.") for name in names):
        raise Unsupported(
            "flux1_controlnet: MistoLine's ControlNet reads pixels in layers of its own, which are not "
            f"supported; {_USUAL}"
        )
    if any(name.startswith("input_hint_block.") for name in names):
        raise Unsupported(
            f"flux1_controlnet: XLabs' ControlNet reads pixels (input_hint_block), which is not supported; {_USUAL}"
        )


def _original_entries(config: Flux1ControlNetConfig) -> Iterator[Entry]:
    h = config.hidden
    yield from layer_entries("img_in", (h, PACKED_CHANNELS), "x_embedder")
    yield from layer_entries("pos_embed_input", (h, PACKED_CHANNELS), "controlnet_x_embedder")
    yield from layer_entries("txt_in", (h, config.context_channels), "context_embedder")
    yield from embedder("time_in", h, TIMESTEP_CHANNELS, "timestep_embedder")
    yield from embedder("vector_in", h, config.pooled_channels, "text_embedder")
    if config.has_guidance:
        yield from embedder("guidance_in", h, TIMESTEP_CHANNELS, "guidance_embedder")
    if config.modes:
        yield tensor_entry(MODES, (config.modes, h))
    for i in range(config.double_blocks):
        yield from double_block(f"double_blocks.{i}", h, f"{DOUBLE}.{i}")
        yield from layer_entries(f"controlnet_blocks.{i}", (h, h), f"controlnet_blocks.{i}")
    for i in range(config.single_blocks):
        yield from single_block(f"single_blocks.{i}", h, f"{SINGLE}.{i}")
        yield from layer_entries(f"controlnet_single_blocks.{i}", (h, h), f"controlnet_single_blocks.{i}")
