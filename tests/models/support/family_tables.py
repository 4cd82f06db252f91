"""The tables of families of ``docs/models.md``, made from what is registered and from the facts that clients get."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import family_entries
import torch
from family_entries import FamilyEntry

from xditd.client.comfyui import families as comfyui
from xditd.gpu_workers.models.lora_targets import takes_loras
from xditd.gpu_workers.models.operations import Wanted
from xditd.gpu_workers.models.registry import detect, operations_of, own_families
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.process import lean_imports, xfuser_cpu
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import Unsupported
from xditd.ipc.facts import ArgumentFacts, ControlNetFacts, TransformerFacts

_LAYOUT = ParallelLayout(0, Degrees(), torch.device("cpu"), "SDPA")
_GUIDANCE = {"none": "none", "embedded": "an input", "classifier_free": "classifier-free"}


def of_kind(kind: str) -> list[FamilyEntry]:
    """Return the entries of a kind, in the order of the entries."""
    return [each for each in family_entries.ENTRIES if _family(each.family).kind == kind]


@cache
def _family(name: str) -> Any:
    (found,) = (each for each in own_families() if each.name == name)
    return found


def resolved(entry: FamilyEntry, layout: str) -> Resolution:
    """Match the tensors of a layout as the workers do: the family by their names, the rest by their shapes."""
    _, tensors = entry.tensors(layout)
    return resolve(detect(tensors.keys()), tensors)


def transformer_facts(entry: FamilyEntry) -> TransformerFacts:
    found: TransformerFacts = _operations(entry).facts(entry.config, _LAYOUT)
    return found


def facts(entry: FamilyEntry) -> Any:
    """Return the facts of a VAE or a text encoder."""
    return _operations(entry).facts(entry.config)


def _operations(entry: FamilyEntry) -> Any:
    with xfuser_cpu.importable():
        lean_imports.import_xfuser()
        return operations_of(_family(entry.family))


def transformers() -> Iterator[tuple[str, ...]]:
    yield (
        "family", "variant", "parameters", "layouts of files", "`generate` takes", "guidance, steps", "VAE",
        "text encoders", "LoRAs", "fused kernels",
    )  # fmt: skip
    for entry in of_kind("transformer"):
        family, found = _family(entry.family), transformer_facts(entry)
        yield (
            f"`{entry.family}`",
            entry.variant,
            _parameters(entry),
            "; ".join(entry.layouts),
            _generate(entry, found),
            f"{_GUIDANCE[found.guidance]}, {found.default_guidance_scale:g}; {found.default_steps}",
            f"`{entry.vae}`, {found.latents.channels} channels",
            ", ".join(name for name, _ in entry.encoders),
            _yes(is_so=takes_loras(family) is not None),
            _yes(is_so=bool(family.fused_widths)),
        )


def vaes() -> Iterator[tuple[str, ...]]:
    yield "family", "of", "layouts of files", "latents", "encodes"
    for entry in of_kind("vae"):
        found = facts(entry)
        latents, sides = found.latents, f"{found.latents.pixels}x{found.latents.pixels} pixels"
        size = f"{latents.channels} channels, {sides}" + (f" of {latents.frames} frames" if latents.frames else "")
        yield f"`{entry.family}`", entry.variant, "; ".join(entry.layouts), size, _yes(is_so=found.has_encoder)


def encoders() -> Iterator[tuple[str, ...]]:
    yield (
        "family", "variant", "parameters", "layouts of files", "width", "tokens", "`mask`, `layers`", "`pooled`",
        "LoRAs",
    )  # fmt: skip
    for entry in of_kind("text_encoder"):
        found = facts(entry)
        yield (
            f"`{entry.family}`",
            entry.variant,
            _parameters(entry),
            "; ".join(entry.layouts),
            str(found.width),
            f"{found.max_tokens:,}",
            f"{found.layers} layers" if found.layers else "no",
            _yes(is_so=found.has_pooled),
            _yes(is_so=takes_loras(_family(entry.family)) is not None),
        )


def controlnets() -> Iterator[tuple[str, ...]]:
    yield "family", "variant", "parameters", "layouts of files", "of", "blocks", "modes"
    for entry in of_kind("controlnet"):
        found: ControlNetFacts = _operations(entry).facts(entry.config, _LAYOUT)
        blocks = " + ".join(str(count) for count in found.residuals.values())
        yield (
            f"`{entry.family}`", entry.variant, _parameters(entry), "; ".join(entry.layouts), f"`{found.controls}`",
            blocks, str(found.modes or "none"),
        )  # fmt: skip


def in_comfyui() -> Sequence[str]:
    """Return what the node pack runs, by family."""
    return [each.title for each in comfyui.adapters()]


def _parameters(entry: FamilyEntry) -> str:
    _, tensors = entry.tensors(next(iter(entry.layouts)))
    count = sum(math.prod(each.shape) for each in tensors.values()) / 1e9
    return f"{count:.1f} B" if count >= 1 else f"{count * 1e3:.0f} M"


def _generate(entry: FamilyEntry, found: TransformerFacts) -> str:
    wanted = Wanted(1, 512, 512, found.default_steps, found.default_guidance_scale)
    try:
        _operations(entry).recipe.check(entry.config, wanted)
    except Unsupported as error:
        return f"no: {error.detail}"
    names = [_named(each) for each in found.conditioning]
    more = ["`transformer_2`"] if found.stages > 1 else []
    return ", ".join([*names, *more, *(f"`{option}`" for option in found.options)])


def _named(argument: ArgumentFacts) -> str:
    return f"*{argument.name}*" if argument.is_needed else f"`{argument.name}`"


def _yes(*, is_so: bool) -> str:
    return "yes" if is_so else "no"
