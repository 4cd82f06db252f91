"""Sampling with Qwen-Image as diffusers' pipelines do it, with the same bits: from texts, and by references.

With a guidance scale above 1, a step predicts ``negative + scale * (positive - negative)``, of which each token gets
the norm of its positive prediction.

Source: diffusers, ``pipeline_qwenimage.py``, ``pipeline_qwenimage_edit.py`` and ``pipeline_qwenimage_edit_plus.py``;
tests compare the bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

from xditd.gpu_workers.families.qwen_image.checks import as_mask, check_mask, check_positions
from xditd.gpu_workers.families.qwen_image.config import PATCH, PIXELS_PER_LATENT, SCHEDULER, QwenImageConfig
from xditd.gpu_workers.families.qwen_image.facts import (
    COMFYUI,
    NEGATIVE,
    NEGATIVE_MASK,
    PROMPT,
    PROMPT_MASK,
    REFERENCES,
    SHIFT,
)
from xditd.gpu_workers.families.qwen_image.references import References, packed
from xditd.gpu_workers.models.guidance import Guidance, texts_for
from xditd.gpu_workers.models.job_checks import check_shape, check_split, prepare
from xditd.gpu_workers.models.operations import Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.models.schedules import EULER, check_schedule, euler, tried
from xditd.ipc.errors import BadRequest

MASKS = {PROMPT: PROMPT_MASK, NEGATIVE: NEGATIVE_MASK}


class QwenImageRecipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: QwenImageConfig, wanted: Wanted) -> None:
        check_schedule(wanted.schedule, EULER)
        settings = SCHEDULER if wanted.schedule is None else wanted.schedule.settings
        shift = wanted.options.get(SHIFT)
        if shift is not None and not settings.get("use_dynamic_shifting", False):
            raise BadRequest(f"{SHIFT} {shift:g} beside a scheduler with a fixed shift: set shift in its settings")
        if shift is not None and (kind := settings.get("time_shift_type", "exponential")) != "exponential":
            raise BadRequest(f"{SHIFT} {shift:g} beside a scheduler with time_shift_type={kind!r:.50}: leave one out")
        if shift is not None and wanted.sigmas is not None:
            raise BadRequest(f"{SHIFT} {shift:g} with sigmas: give one of both")
        if shift is not None and not 0 < shift < math.inf:
            raise BadRequest(f"{SHIFT} {shift:g}: use a number above 0, such as 3 for Qwen-Image-Lightning")
        are_unshifted = wanted.sigmas is not None and wanted.schedule is None
        is_stretched = shift is None and not are_unshifted and settings.get("shift_terminal")
        if wanted.steps == 1 and is_stretched:
            raise BadRequest(
                "steps 1: the schedule is stretched between its first and its last step, of which there have to be "
                f"two; give more steps, the option {SHIFT}, or sigmas"
            )

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return torch.float32 if variant == COMFYUI else dtype

    def start(
        self, model: Model[QwenImageConfig], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> QwenImageRun:
        guidance = Guidance(wanted.guidance_scale, keeps_norms=True)
        texts = texts_for(guidance, conditioning, PROMPT, NEGATIVE)
        rows, columns = (side // PIXELS_PER_LATENT // PATCH for side in (wanted.height, wanted.width))
        references = References.of(conditioning.get(REFERENCES))
        images = [(1, rows, columns), *references.sizes]
        masks: list[torch.Tensor | None] = []
        for name, each in texts.items():
            check_shape(name, each, (wanted.batch, None, model.config.text_channels))
            check_positions(name, images, each.shape[1])
            check_split(model.layout, each.shape[1], rows * columns)
            mask = conditioning.get(MASKS[name])
            if mask is not None:
                check_mask(MASKS[name], mask, wanted.batch, each.shape[1])
            masks.append(as_mask(mask, model.device))
        if not guidance.is_on and conditioning.get(NEGATIVE_MASK) is not None:
            raise BadRequest(f"{NEGATIVE_MASK} without {NEGATIVE}: leave it out")
        embeds = prepare(model, **texts, **references.named)
        reference_tokens = packed(embeds[len(texts) :], wanted.batch)
        latents = cast(torch.Tensor, QwenImagePipeline._pack_latents(noise.contiguous(), *noise.shape))
        scheduler = tried(wanted.schedule, lambda: _scheduled(wanted, latents.shape[1], model.device))
        # As the pipeline gives them to the model. The host reads them here, before it would wait for GPU work.
        timesteps = scheduler.timesteps.to(latents.dtype) / SCHEDULER["num_train_timesteps"]
        fixed = [
            {
                "encoder_hidden_states": each,
                "encoder_hidden_states_mask": mask,
                "img_shapes": [images] * wanted.batch,
            }
            for each, mask in zip(embeds, masks, strict=False)
        ]
        return QwenImageRun(
            scheduler=scheduler,
            latents=latents,
            timesteps=timesteps,
            foreseen={"timestep": tuple(timesteps.tolist())},
            fixed=fixed,
            references=reference_tokens,
            guidance=guidance,
            dtype=model.dtype,
            size=(wanted.height, wanted.width),
        )


@dataclass(frozen=True, eq=False)
class QwenImageRun:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`. Latents are packed, (batch, tokens, 64)."""

    scheduler: FlowMatchEulerDiscreteScheduler
    latents: torch.Tensor
    timesteps: torch.Tensor
    """The model's timestep at each step, (steps,)."""
    foreseen: Mapping[str, tuple[float, ...]]
    fixed: Sequence[Mapping[str, Any]]
    """The arguments of each forward of a step that do not change between steps: of the prompts, then the negatives."""
    references: torch.Tensor | None
    """The tokens of references, (batch, tokens, 64), in the dtype of the weights."""
    guidance: Guidance
    dtype: torch.dtype
    """Of the weights."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        batch = latents.shape[0]
        tokens = latents.to(self.dtype)
        if self.references is not None:
            tokens = torch.cat([tokens, self.references], dim=1)
        moving = {"hidden_states": tokens, "timestep": self.timesteps[step].expand(batch)}
        known = {"timestep": (self.foreseen["timestep"][step],) * batch}
        return [Inputs({**moving, **fixed}, known) for fixed in self.fixed]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        found = [each if isinstance(each, torch.Tensor) else torch.stack(each) for each in rows]
        return self.guidance.combine([each[:, : latents.shape[1]] for each in found]).to(latents.dtype)

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, QwenImagePipeline._pack_latents(latents.contiguous(), *latents.shape))

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        unpacked = QwenImagePipeline._unpack_latents(latents, *self.size, PIXELS_PER_LATENT)
        return cast(torch.Tensor, unpacked.squeeze(2))


def _shifted(shift: float | None) -> dict[str, Any]:
    """Return the settings of a shift that is the same for all sizes, as the schedules of distilled weights have it."""
    if shift is None:
        return {}
    return {"base_shift": math.log(shift), "max_shift": math.log(shift), "shift_terminal": None}


def _scheduled(wanted: Wanted, image_tokens: int, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """Set the timesteps: the model's own schedule, one with a given shift, or given sigmas.

    Sigmas have the shift of a scheduler that is given, too, else none.
    """
    shift, given = wanted.options.get(SHIFT), wanted.sigmas
    if given is not None:
        settings: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}
    else:
        settings = dict(SCHEDULER)
    scheduler = euler(wanted.schedule, settings, _shifted(shift))
    known = scheduler.config
    mu = calculate_shift(
        image_tokens, known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift
    )
    sigmas = np.linspace(1.0, 1 / wanted.steps, wanted.steps) if given is None else list(given)
    retrieve_timesteps(scheduler, wanted.steps, device, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler
