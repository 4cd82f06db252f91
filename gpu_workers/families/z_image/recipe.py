"""Sampling with Z-Image as diffusers' ``ZImagePipeline`` does it, with the same bits.

Latents are float32 between steps, and rounded for the transformer; those of an image have the VAE's dtype at first. Its
time runs from 0 (noise) to 1 (image), and its prediction points from noise to image, so the scheduler gets it negated.
With a guidance scale above 0, one forward of twice the rows predicts prompts and negative prompts:
``pos + scale * (pos - neg)``.

The tensors of Turbo and Base have the same names and shapes. Turbo runs without guidance and with a schedule shift of
3, Base with guidance and a shift of 6: so the guidance scale decides the shift, unless the option ``shift`` is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

from xditd.gpu_workers.families.z_image.checks import check_list, check_split, check_texts
from xditd.gpu_workers.families.z_image.config import (
    BASE_SHIFT,
    PATCH,
    PIXELS_PER_LATENT,
    TURBO_SHIFT,
    ZImageConfig,
)
from xditd.gpu_workers.families.z_image.facts import CFG_NORMALIZATION, CFG_TRUNCATION, COMFYUI, SHIFT
from xditd.gpu_workers.models.operations import Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.models.schedules import EULER, check_schedule, euler, tried
from xditd.ipc.errors import BadRequest

TRAINED_TIMESTEPS: Final = 1000
PROMPT: Final = "prompt_embeds"
NEGATIVE: Final = "negative_prompt_embeds"


class ZImageRecipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: ZImageConfig, wanted: Wanted) -> None:
        check_schedule(wanted.schedule, EULER)
        options = wanted.options
        shift = options.get(SHIFT)
        if shift is not None and wanted.sigmas is not None:
            raise BadRequest(f"{SHIFT} {shift:g} with sigmas: give one of both")
        if shift is not None and wanted.schedule is not None and wanted.schedule.settings.get("use_dynamic_shifting"):
            raise BadRequest(
                f"{SHIFT} {shift:g} beside a scheduler with dynamic shifting, which has none: leave it out"
            )
        if shift is not None and not 0 < shift < math.inf:
            raise BadRequest(f"{SHIFT} {shift:g}: use a number above 0, such as {TURBO_SHIFT:g} or {BASE_SHIFT:g}")
        if not 0 <= options.get(CFG_NORMALIZATION, 0) < math.inf:
            raise BadRequest(f"{CFG_NORMALIZATION} {options[CFG_NORMALIZATION]:g}: use 0 for none, or more")

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return torch.float32

    def start_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        """As pipelines that start from an image: in the dtype of texts, which their VAE has, too; float32 from step 1.

        Source: diffusers, ``prepare_latents`` of ``pipeline_z_image_img2img.py`` and ``pipeline_z_image_inpaint.py``.
        """
        return torch.float32 if variant == COMFYUI else dtype

    def start(
        self, model: Model[ZImageConfig], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> ZImageRun:
        is_guided = wanted.guidance_scale > 0
        negatives = conditioning.get(NEGATIVE)
        if is_guided and negatives is None:
            raise BadRequest(
                f"{NEGATIVE} is missing: guidance_scale {wanted.guidance_scale:g} needs one for each image; Turbo runs "
                "with guidance_scale 0"
            )
        if negatives is not None and not is_guided:
            raise BadRequest(f"{NEGATIVE} with guidance_scale 0 would have no effect: leave it out, or guide (Base: 4)")
        texts = {PROMPT: conditioning[PROMPT]} | ({NEGATIVE: negatives} if is_guided else {})
        rows, columns = (side // PIXELS_PER_LATENT // PATCH for side in (wanted.height, wanted.width))
        for name, each in texts.items():
            check_list(name, each, wanted.batch)
            check_texts(name, each, model.config)
        check_split(model.layout, rows * columns, [len(text) for each in texts.values() for text in each])
        scheduler = tried(wanted.schedule, lambda: _scheduled(wanted, rows * columns, model.device))
        if wanted.variant == COMFYUI:
            times = 1 - scheduler.sigmas[:-1].to(model.device)
        else:
            times = (TRAINED_TIMESTEPS - scheduler.timesteps) / TRAINED_TIMESTEPS
        return ZImageRun(
            scheduler=scheduler,
            latents=noise,
            prompts=tuple(texts[PROMPT]),
            negatives=tuple(texts.get(NEGATIVE, ())),
            times=times,
            scales=_scales(wanted, times.tolist()),
            normalization=float(wanted.options.get(CFG_NORMALIZATION, 0)),
            dtype=model.dtype,
        )


@dataclass(frozen=True, eq=False)
class ZImageRun:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`.

    Latents are (batch, 16, height, width), in float32; before the first step in the dtype of the noise.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    latents: torch.Tensor
    prompts: tuple[torch.Tensor, ...]
    negatives: tuple[torch.Tensor, ...]
    times: torch.Tensor
    """The transformer's time at each step, (steps,)."""
    scales: tuple[float, ...]
    """The guidance scale at each step; 0: no guidance."""
    normalization: float
    """The largest norm of a guided prediction, relative to that of its prompt's; 0: no limit."""
    dtype: torch.dtype
    """Of the weights."""
    foreseen: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        x, texts = latents.to(self.dtype), self.prompts
        if self.scales[step] > 0:
            x, texts = x.repeat(2, 1, 1, 1), texts + self.negatives
        rows = list(x.unsqueeze(2).unbind())
        return [Inputs({"x": rows, "t": self.times[step].expand(len(rows)), "cap_feats": list(texts)})]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        (results,) = rows
        batch, scale = latents.shape[0], self.scales[step]
        predictions = [result.float() for result in results]
        if scale > 0:
            pairs = zip(predictions[:batch], predictions[batch:], strict=True)
            predictions = [self._guided(positive, negative, scale) for positive, negative in pairs]
        return -torch.stack(predictions).squeeze(2)

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def _guided(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        guided = positive + scale * (positive - negative)
        if not self.normalization:
            return guided
        most = torch.linalg.vector_norm(positive) * self.normalization
        norm = torch.linalg.vector_norm(guided)
        # The pipeline compares on the host, which waits for the GPU; a factor of 1 changes no bit.
        return guided * torch.where(norm > most, most / norm, 1.0)


def _scheduled(wanted: Wanted, image_tokens: int, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """Set the timesteps: the pipeline's schedule, or given sigmas, which a scheduler shifts if it is given, too."""
    if wanted.sigmas is not None:
        shift, sigmas = 1.0, list(wanted.sigmas)
    else:
        shift = wanted.options.get(SHIFT, BASE_SHIFT if wanted.guidance_scale > 0 else TURBO_SHIFT)
        sigmas = get_default_z_image_sigmas(wanted.steps)
    own = {"num_train_timesteps": TRAINED_TIMESTEPS, "shift": shift}
    scheduler = euler(wanted.schedule, own, {"shift": wanted.options[SHIFT]} if SHIFT in wanted.options else {})
    known = scheduler.config
    mu = calculate_shift(
        image_tokens, known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift
    )
    scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler


def _scales(wanted: Wanted, times: Sequence[float]) -> tuple[float, ...]:
    """Return the guidance scale of each step: 0 after the truncation time, if that is 1 or less."""
    truncation = wanted.options.get(CFG_TRUNCATION, 1.0)
    return tuple(0.0 if time > truncation and truncation <= 1 else wanted.guidance_scale for time in times)
