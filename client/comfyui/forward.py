"""The forward of a weightless MODEL: ComfyUI's call of the transformer, as the daemon's ``denoise``.

It sits where ComfyUI calls the transformer (``WrappersMP.DIFFUSION_MODEL``), so samplers, schedulers, guiders, masks,
previews and LoRA loaders work on the MODEL as on any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import comfy.ldm.common_dit
import comfy.model_management
import torch

from xditd.client.comfyui.understood import Understood
from xditd.client.comfyui.unsupported import check_forward
from xditd.client.comfyui.weights import RemoteWeights
from xditd.client.conditioning import Conditioning
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_BATCH, MAX_STEPS

ROUNDING: Final = "float32_time"
"""In half precision ComfyUI rounds neither the timestep before it is embedded, nor latents between steps."""

PATCH = 2
"""Latents on a token's side."""

KNOWN_CONDITIONINGS = 8
"""Rows whose tensors are remembered: positive and negative of a few prompts."""


class RemoteForward:
    """Stands in for the transformer's own forward. ComfyUI calls it as a wrapper."""

    def __init__(
        self, weights: RemoteWeights, pooled_channels: int, has_guidance: bool, understood: Understood | None = None
    ) -> None:
        """Predict with ``weights``, as long as the model is as ``understood`` says."""
        self._weights = weights
        self._understood = understood
        self._pooled_channels = pooled_channels
        self._has_guidance = has_guidance
        self._known: list[tuple[torch.Tensor, torch.Tensor, Conditioning]] = []
        self._last: _Step | None = None
        self._foreseen: tuple[object, list[float]] = (None, [])

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Let the wrappers of other nodes run as they are set up, around the workers instead of the local model.

        Raises:
            Unsupported: the model is not as it was when the run began.
        """
        if self._understood is not None:
            self._understood.check_step()
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
        is_even = height % PATCH == 0 == width % PATCH
        padded = x if is_even else comfy.ldm.common_dit.pad_to_patch_size(x, (PATCH, PATCH))
        pooled = pooled_of(y, context, self._pooled_channels)
        scales = guidance.expand(rows) if guidance is not None and self._has_guidance else None
        sigmas, conditionings = self._read(timestep, scales, context, pooled)
        foreseen = self._foresee((transformer_options or {}).get("sample_sigmas"))
        parts = []
        for first in range(0, rows, MAX_BATCH):
            part = slice(first, first + MAX_BATCH)
            parts.append(self._predict(padded[part], sigmas[part], conditionings[part], foreseen))
        predicted = parts[0] if len(parts) == 1 else torch.cat(parts)
        return predicted if is_even else predicted[:, :, :height, :width]

    def _predict(
        self, latents: torch.Tensor, sigmas: list[float], conditionings: list[Conditioning], foreseen: list[float]
    ) -> torch.Tensor:
        return self._weights.connect().denoise(
            self._weights.loan, latents, sigmas, conditionings, sigmas=foreseen, variant=ROUNDING
        )

    def _foresee(self, sigmas: torch.Tensor | None) -> list[float]:
        """Read the sampler's whole schedule, once for each run; what workers would refuse there foresees nothing."""
        if self._foreseen[0] is not sigmas:
            values = [] if sigmas is None else sigmas.reshape(-1).double().tolist()
            self._foreseen = (sigmas, [value for value in values if 0.0 <= value <= 1.0][:MAX_STEPS])
        return self._foreseen[1]

    def _read(
        self, timestep: torch.Tensor, scales: torch.Tensor | None, context: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[list[float], list[Conditioning]]:
        """Read a step's numbers: sigmas, and a conditioning for each row. Equal rows share what the workers keep.

        Conditioning is compared by content: ComfyUI gathers the tensors anew at each step, and other nodes may replace
        them in between. The host waits once for the GPU: every wait is a part of each step's cost.
        """
        last = self._last
        can_be_last = last is not None and _is_alike(last.context, context) and _is_alike(last.pooled, pooled)
        parts = [timestep.reshape(-1)]
        if scales is not None:
            parts.append(scales)
        if last is not None and can_be_last:
            same = ((last.context == context).all(), (last.pooled == pooled).all())
            parts += [each.reshape(1) for each in same]
        # One tensor of the widest of their dtypes, which holds each of these numbers exactly.
        numbers: list[float] = torch.cat(parts).tolist()
        sigmas = numbers[: timestep.numel()]
        if last is None or not can_be_last or not all(numbers[-2:]):
            rows = range(context.shape[0])
            kept = [self._kept(context[row : row + 1], pooled[row : row + 1]) for row in rows]
            last = self._last = _Step(context.clone(), pooled.clone(), kept)
        found = numbers[len(sigmas) : len(sigmas) + len(last.kept)] if scales is not None else [None] * len(last.kept)
        return sigmas, [kept.with_guidance(scale) for kept, scale in zip(last.kept, found, strict=True)]

    def _kept(self, context: torch.Tensor, pooled: torch.Tensor) -> Conditioning:
        for at, (known, known_pooled, kept) in enumerate(self._known):
            if _is_same(known, context) and _is_same(known_pooled, pooled):
                self._known.insert(0, self._known.pop(at))
                return kept
        fresh = Conditioning(context, pooled)
        self._known.insert(0, (context.clone(), pooled.clone(), fresh))
        del self._known[KNOWN_CONDITIONINGS:]
        return fresh


def pooled_of(y: torch.Tensor | None, like: torch.Tensor, channels: int) -> torch.Tensor:
    """The pooled text state as FLUX.1 reads it: no more than ``channels`` wide, and zeros where there is none."""
    return like.new_zeros(like.shape[0], channels) if y is None else y[:, :channels]


@dataclass(frozen=True)
class _Step:
    """The conditioning of the last step, row by row."""

    context: torch.Tensor
    pooled: torch.Tensor
    kept: list[Conditioning]


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _is_alike(one, other) and torch.equal(one, other)
