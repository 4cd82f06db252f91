"""The forward of a weightless MODEL: ComfyUI's call of the transformer, as the daemon's ``denoise``.

It sits where ComfyUI calls the transformer (``WrappersMP.DIFFUSION_MODEL``), so samplers, schedulers, guiders, masks,
previews and LoRA loaders work on the MODEL as on any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import torch

from xditd.client.comfyui.refusals import check_forward
from xditd.client.comfyui.weights import RemoteWeights
from xditd.ipc.errors import BadRequest

PATCH = 2
"""Latents on a token's side."""


class RemoteForward:
    """Stands in for the transformer's own forward. ComfyUI calls it as a wrapper."""

    def __init__(self, weights: RemoteWeights, pooled_channels: int, has_guidance: bool) -> None:
        self._weights = weights
        self._pooled_channels = pooled_channels
        self._has_guidance = has_guidance

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Let the wrappers of other nodes run as they are set up, around the workers instead of the local model."""
        executor.original = self.run
        result: torch.Tensor = executor(*args, **kwargs)
        return result

    def run(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: object | None = None,
        control: object | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Predict the velocity for latents ``x`` (rows, 16, height/8, width/8) at one sigma a row.

        Raises:
            Unsupported: a patch or a model that the workers cannot run.
            BadRequest: no conditioning.
        """
        check_forward(
            transformer_options or {},
            control=control,
            ref_latents=ref_latents,
            attention_mask=more.get("attention_mask"),
        )
        if context is None:
            raise BadRequest("XDiT: the conditioning has no text embeddings; connect CLIP Text Encode")
        # ComfyUI looks for Cancel at every operation of a local model. Here a whole forward is one operation.
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows, _, height, width = x.shape
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, (PATCH, PATCH))
        pooled = x.new_zeros(rows, self._pooled_channels) if y is None else y[:, : self._pooled_channels]
        predicted = torch.empty_like(padded)
        for scale, members in _by_guidance(guidance if self._has_guidance else None, rows):
            predicted[members] = self._weights.connect().denoise(
                self._weights.loan, padded[members], timestep[members], context[members], pooled[members], scale
            )
        return predicted[:, :, :height, :width]


def _by_guidance(guidance: torch.Tensor | None, rows: int) -> list[tuple[float | None, list[int]]]:
    """Group rows by their guidance scale: a request has one."""
    if guidance is None:
        return [(None, list(range(rows)))]
    values = guidance.float().reshape(-1).tolist()
    if len(values) == 1:
        values = values * rows
    groups: dict[float, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    return list(groups.items())
