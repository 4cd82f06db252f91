"""FLUX.1's ControlNets: ComfyUI's ``ControlNetFlux`` as calls of ``FluxControlNetModel``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import ControlCall, ControlSource, Keep, Kept, Residual
from xditd.client.comfyui.families.rows import join_rows, pad_to_patch
from xditd.client.comfyui.naming import name_of
from xditd.client.families.flux1 import PATCH, pack
from xditd.client.jobs.arguments import RowsOf
from xditd.client.jobs.controls import CallControl

if TYPE_CHECKING:
    from xditd.client.jobs.arguments import KeptTensor

PICTURE_CHANNELS: Final = 64
"""Of a token of the picture: its latents."""
RESIDUALS: Final = {"input": "controlnet_block_samples", "output": "controlnet_single_block_samples"}
"""Arguments of the transformer's class by ComfyUI's kind of blocks."""
CONTROL_TYPE: Final = "control_type"
KNOWN_PICTURES: Final = 8


def control_source(control: Any, hidden: int) -> ControlSource | str:
    """Return how a stock ControlNet is lent for a transformer of ``hidden`` channels, or why it cannot be."""
    import comfy.ldm.flux.controlnet

    model = control.control_model
    if type(model) is not comfy.ldm.flux.controlnet.ControlNetFlux:
        return f"ControlNet of another model ({name_of(type(model))})"
    if not model.latent_input:
        maker = "MistoLine" if model.mistoline else "XLabs"
        return f"ControlNet of {maker}, which reads pixels"
    if control.concat_mask or control.extra_concat_orig or model.pos_embed_input.weight.shape[1] != PICTURE_CHANNELS:
        return "ControlNet with a mask (ControlNetInpaintingAliMamaApply)"
    if model.hidden_size != hidden:
        return f"ControlNet of {model.hidden_size} channels for a model of {hidden}"
    types = control.extra_args.get(CONTROL_TYPE, [])
    if unknown := sorted(control.extra_args.keys() - {CONTROL_TYPE}):
        return f"ControlNet with the argument {unknown[0]!r}"
    if len(types) > 1 or any(not 0 <= each < max(model.num_union_modes, 1) for each in types):
        return f"ControlNet of {model.num_union_modes} types with the type {', '.join(map(str, types))}"
    dtype = control.manual_cast_dtype or model.dtype
    return ControlSource(
        label="controlnet",
        tensors={name: each.detach().to(dtype) for name, each in model.state_dict().items()},
        dtype=dtype,
        numbers=_numbers(model),
    )


def _numbers(model: Any) -> dict[str, list[int]]:
    """Return which residual ComfyUI puts at which place of its lists: each in a row, as often as fits."""
    found = {}
    for kind, count, places in (
        ("input", model.params.depth, model.main_model_double),
        ("output", model.params.depth_single_blocks, model.main_model_single),
    ):
        if count:
            repeat = ceil(places / count)
            found[kind] = [number for number in range(count) for _ in range(repeat)][:places]
    return found


@dataclass(frozen=True, eq=False)
class UsedControl:
    """A ControlNet of one call: what stock was given, and which blocks get which of its residuals."""

    call: ControlCall
    number: int
    scale: float
    blocks: Mapping[str, Sequence[int]]

    def numbers(self, rows: int) -> dict[str, torch.Tensor]:
        """Return the values of each row that the host needs."""
        given = self.call.given
        found = {self._name("timestep"): given["timesteps"].reshape(-1).expand(rows)}
        if given.get("guidance") is not None:
            found[self._name("guidance")] = given["guidance"].reshape(-1).expand(rows)
        return found

    def texts(self, pooled_channels: int) -> dict[str, torch.Tensor]:
        """Return the conditioning, (rows, ...), in the ControlNet's dtype."""
        given, text = self.call.given, self.call.given["context"]
        y = given.get("y")
        pooled = text.new_zeros(text.shape[0], pooled_channels) if y is None else y[:, :pooled_channels]
        return {self._name("text"): text, self._name("pooled"): pooled}

    def call_control(
        self,
        rows: slice,
        numbers: Mapping[str, list[float]],
        kept: Sequence[Kept],
        pictures: KeptPictures,
        keep: Keep,
        ids: Callable[[int], tuple[Any, Any]],
    ) -> CallControl:
        """Return the ControlNet as a call takes it; ``ids`` gives the positions of the image and of so many tokens."""
        given = self.call.given
        img_ids, txt_ids = ids(given["context"].shape[1])
        count = len(numbers[self._name("timestep")])
        arguments: dict[str, Any] = {
            "hidden_states": pack(pad_to_patch(given["x"][rows], PATCH)),
            "controlnet_cond": pictures.keep(given["hint"], rows, count, keep),
            "encoder_hidden_states": join_rows([row[self._name("text")] for row in kept]),
            "pooled_projections": join_rows([row[self._name("pooled")] for row in kept]),
            "timestep": torch.tensor(numbers[self._name("timestep")], dtype=torch.float32),
            "img_ids": img_ids,
            "txt_ids": txt_ids,
        }
        if self._name("guidance") in numbers:
            arguments["guidance"] = torch.tensor(numbers[self._name("guidance")], dtype=torch.float32)
        for mode in given.get(CONTROL_TYPE, []):
            arguments["controlnet_mode"] = torch.full((count, 1), mode, dtype=torch.int64)
        return CallControl(self.call.weights.loan, arguments, self.scale, self.blocks)

    def _name(self, what: str) -> str:
        return f"control {self.number}: {what}"


class KeptPictures:
    """The latents of pictures that the workers keep, by the tensor that ComfyUI keeps during a run."""

    def __init__(self) -> None:
        self._known: list[tuple[torch.Tensor, int | torch.Tensor, slice, KeptTensor]] = []

    def keep(self, hint: torch.Tensor, rows: slice, count: int, keep: Keep) -> KeptTensor | RowsOf:
        """Return the packed latents of these ``count`` rows, kept; one picture is that of all."""
        of_all = hint.shape[0] == 1
        alike = (each for each in self._known if each[0] is hint and each[2] == rows and _is_as_it_was(hint, each[1]))
        found = next(alike, None)
        if found is None:
            found = hint, _state_of(hint), rows, keep(pack(pad_to_patch(hint if of_all else hint[rows], PATCH)))
            self._known.insert(0, found)
            del self._known[KNOWN_PICTURES:]
        return RowsOf([(found[3], count)]) if of_all and count > 1 else found[3]


def _state_of(hint: torch.Tensor) -> int | torch.Tensor:
    """Return what tells later whether ``hint`` was written to: its version, or a copy where torch counts none.

    ComfyUI's executor runs in inference mode, whose tensors have no version.
    """
    return hint.clone() if hint.is_inference() else hint._version


def _is_as_it_was(hint: torch.Tensor, state: int | torch.Tensor) -> bool:
    return torch.equal(hint, state) if isinstance(state, torch.Tensor) else hint._version == state


def read_controls(control: object, blocks: tuple[int, int], faults: list[str]) -> list[UsedControl]:
    """Read ComfyUI's lists of residuals for a model of so many double and single blocks.

    What the workers cannot run is added to ``faults``.
    """
    if not control:
        return []
    found: dict[ControlCall, tuple[set[float], dict[str, list[int]]]] = {}
    lists = control if isinstance(control, Mapping) else {"": [control]}
    is_known = True
    for kind, places in lists.items():
        depth = blocks[list(RESIDUALS).index(kind)] if kind in RESIDUALS else 0
        is_known = (
            is_known and all(isinstance(each, Residual) for each in places) and not (places and kind not in RESIDUALS)
        )
        for place in list(places)[:depth] if is_known else ():
            for call, of_kind, number, scale in place.terms:
                scales, numbers = found.setdefault(call, (set(), {}))
                scales.add(scale)
                numbers.setdefault(RESIDUALS[of_kind], []).append(number)
                is_known = is_known and of_kind == kind
    counts = dict(zip(RESIDUALS.values(), blocks, strict=True))
    is_known = is_known and all(
        len(scales) == 1 and all(len(each) == counts[name] for name, each in numbers.items())
        for scales, numbers in found.values()
    )
    if not is_known:
        faults.append("ControlNet whose residuals another node has changed")
        return []
    return [
        UsedControl(call, number, scales.pop(), numbers)
        for number, (call, (scales, numbers)) in enumerate(found.items())
    ]
