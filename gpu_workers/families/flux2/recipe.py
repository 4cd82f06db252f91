"""Sampling with FLUX.2 as diffusers' ``Flux2Pipeline`` and ``Flux2KleinPipeline`` do it, with the same bits.

dev takes the guidance scale as an input. klein has none: above 1, ``negative + scale * (positive - negative)``, which
is meant for its base; the distilled weights run without (scale 1).

References are latents of other images, of any sizes. Their tokens follow those of the image in every step, with ids of
their own. With the option ``kv_cache``, which klein's KV weights are made for, they come first, are computed in the
first step alone, at timestep 0, and later steps attend to their keys and values.

Source: diffusers, ``pipeline_flux2.py``, ``pipeline_flux2_klein.py`` and ``pipeline_flux2_klein_kv.py``;
tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps

from xditd.gpu_workers.families.flux2.config import CHANNELS, PIXELS_PER_LATENT, SCHEDULER, Flux2Config
from xditd.gpu_workers.families.flux2.facts import FLOAT32_TIME, KV_CACHE, NEGATIVE, PROMPT, REFERENCES
from xditd.gpu_workers.families.flux2.module import CACHE, ReferenceCache
from xditd.gpu_workers.models.job_checks import check_shape, check_split, prepare
from xditd.gpu_workers.models.operations import Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.models.schedules import EULER, check_schedule, euler, tried
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.limits import MAX_SIDE_PIXELS

TRAINED_TIMESTEPS = 1000


class Flux2Recipe:
    """See :class:`~xditd.gpu_workers.models.operations.Recipe`."""

    def check(self, config: Flux2Config, wanted: Wanted) -> None:
        check_schedule(wanted.schedule, EULER)
        kv_cache = wanted.options.get(KV_CACHE, 0)
        if kv_cache not in (0, 1):
            raise BadRequest(f"{KV_CACHE} {kv_cache:g}: use 1, or 0 for none")
        if kv_cache and wanted.guidance_scale > 1:
            raise BadRequest(
                f"{KV_CACHE} with guidance_scale {wanted.guidance_scale:g}: klein's KV weights are distilled; use 1"
            )

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        return torch.float32 if variant == FLOAT32_TIME else dtype

    def start(
        self, model: Model[Flux2Config], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> Flux2Run:
        config = model.config
        is_guided = not config.has_guidance and wanted.guidance_scale > 1
        texts = _texts(conditioning, wanted, is_guided=is_guided)
        rows, columns = (side // PIXELS_PER_LATENT for side in (wanted.height, wanted.width))
        references = _References.of(conditioning.get(REFERENCES), wanted, model.layout)
        for name, each in texts.items():
            check_shape(name, each, (wanted.batch, None, config.context_channels))
            check_split(model.layout, each.shape[1], rows * columns)
        prepared = prepare(model, **texts, **references.named)
        embeds = prepared[: len(texts)]
        latents = Flux2Pipeline._pack_latents(noise.contiguous())
        image_ids = Flux2Pipeline._prepare_latent_ids(noise[:1])[0].to(model.device)
        references = references.packed(prepared[len(texts) :], wanted.batch)
        scheduler = tried(wanted.schedule, lambda: _scheduled(wanted, latents.shape[1], model.device))
        timesteps = scheduler.timesteps.to(latents.dtype) / TRAINED_TIMESTEPS
        guidance = torch.full([1], wanted.guidance_scale, device=model.device, dtype=torch.float32)
        fixed = [
            {
                "encoder_hidden_states": each,
                "txt_ids": Flux2Pipeline._prepare_text_ids(each[:1])[0].to(model.device),
                "guidance": guidance.expand(wanted.batch) if config.has_guidance else None,
            }
            for each in embeds
        ]
        return Flux2Run(
            scheduler=scheduler,
            latents=latents,
            timesteps=timesteps,
            foreseen={"timestep": tuple(timesteps.tolist())},
            fixed=fixed,
            image_ids=image_ids,
            references=references,
            known={"guidance": (wanted.guidance_scale,) * wanted.batch} if config.has_guidance else {},
            guidance_scale=wanted.guidance_scale,
            dtype=model.dtype,
            size=(rows, columns),
        )


@dataclass(frozen=True, eq=False)
class Flux2Run:
    """See :class:`~xditd.gpu_workers.models.operations.DenoisingRun`. Latents are packed, (batch, tokens, 128)."""

    scheduler: FlowMatchEulerDiscreteScheduler
    latents: torch.Tensor
    timesteps: torch.Tensor
    """The model's timestep at each step, (steps,)."""
    foreseen: Mapping[str, tuple[float, ...]]
    fixed: Sequence[Mapping[str, Any]]
    """The arguments of each forward of a step that do not change between steps: of the prompts, then the negatives."""
    image_ids: torch.Tensor
    references: _References
    known: Mapping[str, tuple[float, ...]]
    guidance_scale: float
    dtype: torch.dtype
    """Of the weights."""
    size: tuple[int, int]
    """Rows and columns of tokens."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        batch = latents.shape[0]
        moving = {
            **self.references.joined(latents.to(self.dtype), self.image_ids),
            "timestep": self.timesteps[step].expand(batch),
        }
        known = {"timestep": (self.foreseen["timestep"][step],) * batch, **self.known}
        return [Inputs({**moving, **fixed}, known) for fixed in self.fixed]

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        found = [each if isinstance(each, torch.Tensor) else torch.stack(each) for each in rows]
        found = [each[:, : latents.shape[1]] for each in found]
        if len(found) == 1:
            return found[0].to(latents.dtype)
        positive, negative = found
        return (negative + self.guidance_scale * (positive - negative)).to(latents.dtype)

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2).unflatten(2, self.size)


@dataclass(frozen=True, eq=False)
class _References:
    """References of a generation: ``named`` as given, or ``tokens`` (batch, tokens, 128) of all with their ``ids``.

    With a ``cache``, their tokens come before those of the image, in the first step alone.
    """

    named: Mapping[str, Any] = field(default_factory=dict)
    tokens: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    has_cache: bool = False
    cache: ReferenceCache | None = None

    @classmethod
    def of(cls, given: Any, wanted: Wanted, layout: ParallelLayout) -> _References:
        """Check references.

        Raises:
            BadRequest: no list, or a wrong shape.
            Unsupported: with a cache, fewer tokens than ranks.
        """
        has_cache = bool(wanted.options.get(KV_CACHE, 0))
        if given is None:
            return cls()
        if not isinstance(given, (list, tuple)) or not given:
            raise BadRequest(f"{REFERENCES}: {type(given).__name__} where a list is needed, with a tensor for each")
        named = {f"{REFERENCES}[{number}]": each for number, each in enumerate(given)}
        for name, each in named.items():
            check_shape(name, each, (CHANNELS, None, None))
            if max(each.shape[1:]) * PIXELS_PER_LATENT > MAX_SIDE_PIXELS:
                raise BadRequest(f"{name}: shape is {list(each.shape)}, use {MAX_SIDE_PIXELS} pixels on a side at most")
        tokens = sum(each.shape[1] * each.shape[2] for each in given)
        if has_cache and tokens < layout.degrees.sequence:
            raise Unsupported(
                f"{REFERENCES}: {tokens} tokens are too few to split over {layout.degrees.sequence} workers: use a "
                "larger reference or fewer workers"
            )
        return cls(named, has_cache=has_cache)

    def packed(self, references: Sequence[torch.Tensor], batch: int) -> _References:
        """Return them as tokens, from tensors that are on the device."""
        if not references:
            return self
        rows = [each[None] for each in references]
        ids = Flux2Pipeline._prepare_image_ids(rows)[0].to(rows[0].device)
        tokens = torch.cat([Flux2Pipeline._pack_latents(each) for each in rows], dim=1).repeat(batch, 1, 1)
        return replace(self, tokens=tokens, ids=ids, cache=ReferenceCache(tokens.shape[1]) if self.has_cache else None)

    def joined(self, latents: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of a forward for the image's tokens and these."""
        if self.tokens is None or self.ids is None:
            return {"hidden_states": latents, "img_ids": ids}
        if self.cache is None:
            return {"hidden_states": torch.cat([latents, self.tokens], dim=1), "img_ids": torch.cat([ids, self.ids])}
        if self.cache.is_filled:
            return {"hidden_states": latents, "img_ids": ids, CACHE: self.cache}
        return {
            "hidden_states": torch.cat([self.tokens, latents], dim=1),
            "img_ids": torch.cat([self.ids, ids]),
            CACHE: self.cache,
        }


def _texts(conditioning: Mapping[str, Any], wanted: Wanted, *, is_guided: bool) -> dict[str, Any]:
    """Return the embeddings of the prompts, and of the negatives where they are needed.

    Raises:
        BadRequest: they are missing, or would have no effect.
    """
    negative = conditioning.get(NEGATIVE)
    if not is_guided:
        if negative is not None:
            raise BadRequest(
                f"{NEGATIVE} with guidance_scale {wanted.guidance_scale:g} would have no effect: leave it out, or "
                "guide with more than 1 (klein's base: 4)"
            )
        return {PROMPT: conditioning[PROMPT]}
    if negative is None:
        raise BadRequest(
            f"{NEGATIVE} is missing: guidance_scale {wanted.guidance_scale:g} needs one for each image; klein's "
            "distilled weights run with guidance_scale 1"
        )
    return {PROMPT: conditioning[PROMPT], NEGATIVE: negative}


def _scheduled(wanted: Wanted, image_tokens: int, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """Set the timesteps: the model's own schedule, or given sigmas, which a scheduler shifts if it is given, too."""
    given = wanted.sigmas
    settings = SCHEDULER if given is None else {"shift": 1.0, "use_dynamic_shifting": False}
    scheduler = euler(wanted.schedule, settings)
    sigmas = np.linspace(1.0, 1 / wanted.steps, wanted.steps) if given is None else list(given)
    mu = compute_empirical_mu(image_tokens, wanted.steps)
    retrieve_timesteps(scheduler, wanted.steps, device, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler
