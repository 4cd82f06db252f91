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
from xditd.client.conditioning import Conditioning
from xditd.ipc.errors import BadRequest

PATCH = 2
"""Latents on a token's side."""

KNOWN_CONDITIONINGS = 8
"""Rows whose tensors are remembered: positive and negative of a few prompts."""


class RemoteForward:
    """Stands in for the transformer's own forward. ComfyUI calls it as a wrapper."""

    def __init__(self, weights: RemoteWeights, pooled_channels: int, has_guidance: bool) -> None:
        self._weights = weights
        self._pooled_channels = pooled_channels
        self._has_guidance = has_guidance
        self._known: list[tuple[torch.Tensor, torch.Tensor, Conditioning]] = []

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
        conditionings = self._conditionings(context, pooled, guidance if self._has_guidance else None)
        client = self._weights.connect()
        predicted = client.denoise(self._weights.loan, padded, timestep.float(), conditionings)
        return predicted[:, :, :height, :width]

    def _conditionings(
        self, context: torch.Tensor, pooled: torch.Tensor, guidance: torch.Tensor | None
    ) -> list[Conditioning]:
        """One for each row; rows of equal content share what the workers keep, at this step and at the next ones."""
        rows = context.shape[0]
        scales: list[float | None] = [None] * rows
        if guidance is not None:
            scales = guidance.float().reshape(-1).expand(rows).tolist()
        found = [self._kept(context[row : row + 1], pooled[row : row + 1]) for row in range(rows)]
        return [kept.with_guidance(scale) for kept, scale in zip(found, scales, strict=True)]

    def _kept(self, context: torch.Tensor, pooled: torch.Tensor) -> Conditioning:
        # By content: ComfyUI gathers the tensors anew at each step, and other nodes may replace them in between.
        for at, (known, known_pooled, kept) in enumerate(self._known):
            if _is_same(known, context) and _is_same(known_pooled, pooled):
                self._known.insert(0, self._known.pop(at))
                return kept
        fresh = Conditioning(context, pooled)
        self._known.insert(0, (context.clone(), pooled.clone(), fresh))
        del self._known[KNOWN_CONDITIONINGS:]
        return fresh


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
