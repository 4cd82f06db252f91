"""The ``Generate`` job: the denoising loop of all families, and an optional decode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.controls import GenerationControls
from xditd.gpu_workers.jobs.decode import Decoding, decode_into
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.generation_inputs import Given
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.pictures import encode_pictures
from xditd.gpu_workers.jobs.previews import OnDenoised, check_previews, preview_writer
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.jobs.start_images import StartedFrom
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.calls import run_parts
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.job_checks import check_output
from xditd.gpu_workers.models.lora_variants import LoraVariant
from xditd.gpu_workers.models.operations import CallOptions, DenoisingRun, TransformerOperations
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.parallel.row_partition import add_halves
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentFacts
from xditd.ipc.requests import Generate
from xditd.ipc.transports.tensor_views import torch_dtype


def run(job: Generate, context: JobContext, progress: Progress) -> Finished:
    """Denoise on every rank, decode if asked for, and write the results on rank 0."""
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        # Both may have one model, which has the weights of the last one that was asked for.
        second = _get_component(job, context, "transformer_2") if "transformer_2" in job.components else None
        transformer = _get_component(job, context, "transformer")
        if second is not None:
            _check_second(transformer, second)
        vae = _get_component(job, context, "vae") if job.out_image is not None or "vae" in job.components else None
        latent_facts = transformer.transformer_facts.latents
        if vae is not None:
            latent_facts.check_vae(vae.vae_facts.latents)
        clock.end_phase("plug")
        io = context.open_io()
        loras = context.components.variant(transformer, job.loras.get("transformer", ()))
        given = Given.read(job, context, transformer, io, vae)
        _check_image(job, io, given, vae, latent_facts)
        check_previews(job, io, given.wanted.batch, vae)
    if vae is not None and given.pictures:
        given.latents |= encode_pictures(given.pictures, vae, context)
    with raise_on_all_ranks():
        loop = Loop.prepare(given, job, transformer, loras)
        del given  # pictures and videos, which are larger than their latents
        if second is not None:
            variant = context.components.variant(second, job.loras.get("transformer_2", ()))
            loop.second = SecondStage(second.model, variant, partial(_plug_second, job, context))
        elif job.loras.get("transformer_2"):
            raise BadRequest("loras: transformer_2 has some, but the job has no such component; leave them out")
    clock.end_phase("inputs")
    finite = FiniteCheck()
    latents = loop.run(finite, progress.step, preview_writer(job, context, io, transformer, vae))
    finite.fetch()
    clock.end_phase("steps")
    with raise_on_all_ranks():
        into = [torch_dtype(job.out_latents.dtype), *([] if vae is None else [vae.match.dtype])]
        loop.controls.check(context, finite.first())
        every = [use for uses in job.loras.values() for use in uses]
        context.check_finite(finite, transformer, *into, loras=every)
    if vae is not None and job.out_image is not None:
        decoding = Decoding(vae, latents, latent_facts.scaling, io, job.out_image, is_clamped=True)
        decode_into(context, progress, decoding)
        clock.end_phase("decode")
    with raise_on_all_ranks():
        if context.is_leader:
            context.components.check_unchanged(transformer, job.loras.get("transformer", ()))
            if second is not None:
                context.components.check_unchanged(second, job.loras.get("transformer_2", ()))
            context.components.check_all_unchanged(each.component_id for each in job.controls)
            io.write("out_latents", job.out_latents, latents)
            clock.end_phase("outputs")
    return Finished({**clock.marks_ms, "first_step": progress.first_step_ms}, loop.reused_steps)


def _check_image(job: Generate, io: OpenIo, given: Given, vae: Component | None, latents: LatentFacts) -> None:
    """Check that an image goes with a VAE, and a VAE with an image or a picture to encode, and the image's place.

    ``latents`` are those of the transformer: a VAE of videos may decode its single images.

    Raises:
        BadRequest: one is without the other; the place has another shape, or a dtype that no image has.
    """
    if vae is None:
        if job.out_image is not None:
            raise BadRequest("generate: out_image without a vae: name one among the components")
        return
    if job.out_image is None:
        if not (given.pictures or given.has_encoded):
            raise BadRequest("generate: a vae without out_image or a picture would have no effect: leave it out")
        return
    frames = (job.sampling.frames,) if latents.frames else ()
    shape = (given.wanted.batch, vae.vae_facts.image_channels, *frames, job.sampling.height, job.sampling.width)
    io.check("out_image", job.out_image, shape)
    check_output("out_image", job.out_image.dtype)


@dataclass(frozen=True, eq=False)
class SecondStage:
    """The transformer of the steps at low noise. ``plug`` gives the model its weights, on all ranks together."""

    model: CachedModel
    loras: LoraVariant | None = None
    plug: Callable[[], object] = lambda: None


@dataclass(eq=False)
class Loop:
    """The denoising loop of one generation, its inputs checked and on the device."""

    model: CachedModel
    operations: TransformerOperations[Any]
    started: DenoisingRun
    options: CallOptions
    batch: int
    steps: int
    loras: LoraVariant | None = None
    reused_steps: int = 0
    second: SecondStage | None = None
    controls: GenerationControls = field(default_factory=GenerationControls)
    origin: StartedFrom | None = None
    """The image that steps start from."""

    @classmethod
    def prepare(cls, given: Given, job: Generate, transformer: Component, loras: LoraVariant) -> Loop:
        """Start the family's run before the first step.

        Raises:
            BadRequest: wrong shapes, or values that are not finite.
            Unsupported: too few tokens for the group.
        """
        model = transformer.model
        operations = model.operations_for("transformer")
        wanted = given.wanted
        started = operations.recipe.start(model, wanted, {**given.conditioning, **given.latents}, given.noise)
        given.reader.finish()
        threshold = job.sampling.step_cache_threshold
        cache = StepCache(threshold) if threshold > 0.0 else None
        options = CallOptions(wanted.variant, started.foreseen, cache)
        origin = None if given.start is None else StartedFrom.of(given.start, started)
        return cls(
            model,
            operations,
            started,
            options,
            wanted.batch,
            wanted.steps,
            loras,
            controls=given.controls,
            origin=origin,
        )

    @torch.inference_mode()
    def run(
        self, finite: FiniteCheck, on_step: Callable[[int, int], None], on_denoised: OnDenoised | None
    ) -> torch.Tensor:
        """Denoise, and return the latents, in the shape of the facts and the dtype of the steps.

        ``on_step(done, total)`` runs on the host after each step was launched, on a GPU before it has finished; if it
        raises, the job fails with that error. ``on_denoised`` runs before ``on_step`` with the step's prediction of the
        clean latents, in float32; all ranks give it, or none. ``finite`` gets the latents after every step.
        """
        started, scheduler = self.started, self.started.scheduler
        first = 0 if self.origin is None else self.origin.first
        latents = started.latents if self.origin is None else self.origin.latents(scheduler)
        model, loras, stage = self.model, self.loras, 0
        with ExitStack() as switched:
            if loras is not None:
                switched.enter_context(loras.switched_on())
            for step, timestep in enumerate(scheduler.timesteps[first:], first):
                if self.second is not None and started.stages[step] != stage:
                    stage, model, loras = 1, self.second.model, self.second.loras
                    switched.close()
                    self.second.plug()
                    switched.enter_context(loras.switched_on() if loras is not None else nullcontext())
                options = self.options
                if loras is not None and loras.changes:
                    options = replace(options, loras=loras.begin_step(step - first))
                rows = run_parts(model, self.operations, self.controls.add(started.parts(latents, step), step), options)
                predicted = started.predicted(rows, latents, step)
                if on_denoised is not None:
                    on_denoised(started.unpacked(latents.float() - scheduler.sigmas[step] * predicted.float()))
                latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
                if self.origin is not None:
                    latents = self.origin.kept(latents, scheduler, step)
                finite.note(f"latents after step {step + 1} of {self.steps}", latents)
                on_step(step + 1 - first, self.steps - first)
        if self.options.step_cache is not None:
            self.reused_steps = add_halves(self.options.step_cache.reused, self.batch)
        return started.unpacked(latents)


def _get_component(job: Generate, context: JobContext, role: str) -> Component:
    component_id = job.components.get(cast(Any, role))
    if component_id is None:
        raise BadRequest(f"components: a {role} is missing; name one by its id")
    return context.components.get(component_id, role.removesuffix("_2"))


def _plug_second(job: Generate, context: JobContext) -> None:
    with raise_on_all_ranks():
        _get_component(job, context, "transformer_2")


def _check_second(first: Component, second: Component) -> None:
    """Refuse a second transformer where there is no second stage, or one of other sizes or another dtype."""
    if first.transformer_facts.stages < 2:
        raise BadRequest(f"transformer_2: {first.match.family.name} runs one transformer; leave it out")
    if (second.match.family.name, second.transformer_facts, second.match.dtype) != (
        first.match.family.name, first.transformer_facts, first.match.dtype
    ):  # fmt: skip
        raise BadRequest(
            f"transformer_2: a {second.match.family.name} in {second.match.dtype} of other sizes or another dtype than "
            f"the transformer, a {first.match.family.name} in {first.match.dtype}; lend the pair of one model"
        )
