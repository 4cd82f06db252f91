"""Wan VACE: ComfyUI's ``VaceWanModel`` as calls of diffusers' ``WanVACETransformer3DModel``.

ComfyUI gives the model a control for each node, of 32 channels of latents and 64 of a mask, and a strength for each.
The workers keep the controls of a row, and get the strengths as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.wan_calls import PATCH, WanCall, WanModel

CONTROL: Final = "control_hidden_states"
SCALE: Final = "control_hidden_states_scale"


class VaceModel(WanModel):
    """One Wan VACE transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`."""

    def __init__(self, control_blocks: int) -> None:
        super().__init__()
        self._control_blocks = control_blocks

    def read(
        self,
        *args: Any,
        vace_context: torch.Tensor | None = None,
        vace_strength: Sequence[float] = (),
        **more: Any,
    ) -> VaceCall:
        """Read a call: ``vace_context`` is (rows, controls, 96, frames, height/8, width/8).

        Raises:
            BadRequest: no text embeddings.
        """
        call = super().read(*args, **more)
        faults, texts, strengths = list(call.faults), dict(call.texts), tuple(map(float, vace_strength))
        if vace_context is None:
            faults.append("no control, which VACE reads (vace_context)")
        else:
            controls, needed = vace_context.shape[1], _token_sides(call.x)
            if tuple(vace_context.shape[3:]) != needed:
                faults.append(
                    f"a control of {_sides(vace_context.shape[3:])} latents for a video of {_sides(needed)} (frames, "
                    "rows and columns; Wan VACE To Video gives both alike)"
                )
            if len(strengths) < controls:
                faults.append(f"{len(strengths)} strengths for {controls} controls (vace_strength)")
            texts[CONTROL] = vace_context.expand(call.rows, *vace_context.shape[1:])
            strengths = strengths[:controls]
        plain = {each.name: getattr(call, each.name) for each in fields(call)}
        return VaceCall(
            **plain | {"faults": faults, "texts": texts}, strengths=strengths, control_blocks=self._control_blocks
        )

    def _of_class(self, name: str, row: torch.Tensor) -> torch.Tensor:
        return row.flatten(0, 1) if name == CONTROL else super()._of_class(name, row)


@dataclass(frozen=True, eq=False, kw_only=True)
class VaceCall(WanCall):
    """One call of ComfyUI's ``VaceWanModel``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    strengths: Sequence[float]
    """Of each control."""
    control_blocks: int

    def arguments(
        self,
        rows: slice,
        numbers: Mapping[str, list[float]],
        kept: Sequence[Kept],
        keep: Keep,
        dtype: torch.dtype,
    ) -> list[Arguments]:
        (found,) = super().arguments(rows, numbers, kept, keep, dtype)
        # Not in the dtype of the weights: ComfyUI multiplies by the number itself.
        scales = torch.tensor(self.strengths, dtype=torch.float32)[:, None].repeat(1, self.control_blocks)
        return [found | {SCALE: scales}]


def _token_sides(x: torch.Tensor) -> tuple[int, ...]:
    """Return frames, rows and columns of latents, whole tokens."""
    return tuple(side + -side % patch for side, patch in zip(x.shape[2:], PATCH, strict=True))


def _sides(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
