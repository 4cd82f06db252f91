"""Running one job on one rank: inputs in, the pipeline, outputs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from xditd.gpu_workers.families.flux1 import pipelines
from xditd.gpu_workers.families.flux1.conditionings import Conditioning, KeptConditionings
from xditd.gpu_workers.families.flux1.config import LATENT_CHANNELS, PIXELS_PER_LATENT
from xditd.gpu_workers.families.flux1.modulations import Times
from xditd.gpu_workers.families.flux1.timesteps import time_dtype
from xditd.gpu_workers.families.flux_vae import image_coding
from xditd.gpu_workers.families.flux_vae.checkpoint import IMAGE_CHANNELS
from xditd.gpu_workers.families.flux_vae.split_decode import whole_group
from xditd.gpu_workers.jobs import text_encoding
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.components import Component, Components
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.skeletons import Skeleton
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.gpu_workers.parallel.fellows import together, with_every_core
from xditd.ipc.errors import BadRequest
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Decode, Denoise, Encode, EncodeText, Generate, Job, Part
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.layout import torch_dtype


class JobRunner:
    """Runs jobs on this rank's components. Rank 0 alone writes outputs, encodes, and decodes small images."""

    def __init__(self, components: Components, rank: int, device: torch.device) -> None:
        self._components = components
        self._is_leader = rank == 0
        self._device = device
        self._bands = whole_group()
        self._kept = KeptConditionings()

    def forget(self, client: ProcessIdentity) -> None:
        """Free what is kept for a client that is gone."""
        self._kept.forget(client)

    def run(self, job: Job, open_io: Callable[[], OpenIo], progress: Progress, client: ProcessIdentity) -> Finished:
        """Run a client's job and return what is to be said of it.

        Raises:
            RequestError: on every rank alike, before any step.
            OtherRankFailed, OutOfMemory, PeerError: inputs could not be had; on every rank.
            Cancelled: on every rank at the same step.
            NotFinite: a result is, on rank 0 or on every rank, once no rank waits for another any more.
        """
        started = time.perf_counter()
        cache: StepCache | None = None
        if isinstance(job, Generate):
            cache = StepCache(job.step_cache_threshold) if job.step_cache_threshold > 0.0 else None
            timings = self._generate(job, open_io, progress, cache)
        elif isinstance(job, Denoise):
            timings = self._denoise(job, open_io, client)
        elif isinstance(job, Decode):
            timings = self._decode(job, open_io)
        elif isinstance(job, Encode):
            timings = self._encode(job, open_io)
        else:
            timings = self._encode_text(job, open_io)
        timings["total"] = (time.perf_counter() - started) * 1e3
        return Finished(timings, 0 if cache is None else cache.reused)

    def _generate(
        self, job: Generate, open_io: Callable[[], OpenIo], progress: Progress, cache: StepCache | None
    ) -> dict[str, float]:
        clock = _Laps(self._device)
        with together():
            transformer = self._components.get(job.transformer_id, "transformer")
            vae = self._vae_for(job)
            clock.lap("plug")
            batch = job.prompt_embeds.shape[0] if job.prompt_embeds.shape else 0
            io = open_io()
            io.check("out_latents", job.out_latents, _latent_shape(batch, job.height, job.width))
            if job.out_image is not None:
                io.check("out_image", job.out_image, (batch, 3, job.height, job.width))
            show = self._previews_of(job, io)
            prompt_embeds = io.read("prompt_embeds", job.prompt_embeds, self._device)
            pooled = io.read("pooled_prompt_embeds", job.pooled_prompt_embeds, self._device)
            if job.noise is not None:
                noise = io.read("noise", job.noise, self._device)
            else:
                dtype = time_dtype(transformer.plan.dtype, job.variant)
                noise = pipelines.seeded_noise(
                    job.seed or 0, batch=batch, height=job.height, width=job.width, dtype=dtype
                )
        clock.lap("inputs")
        finite = FiniteCheck()
        latents = pipelines.generate(
            transformer.plan.skeleton,
            prompt_embeds=prompt_embeds,
            pooled=pooled,
            noise=noise,
            height=job.height,
            width=job.width,
            steps=job.steps,
            sigmas=job.sigmas,
            guidance_scale=job.guidance_scale,
            on_step=progress.step,
            on_denoised=show,
            step_cache=cache,
            variant=job.variant,
            finite=finite,
        )
        finite.fetch()
        clock.lap("steps")
        with together():
            into = [torch_dtype(job.out_latents.dtype), *([] if vae is None else [vae.plan.dtype])]
            self._check_finite(finite, transformer, *into)
        image = None if vae is None else self._decode_by_all(vae, latents)
        with together():
            if self._is_leader and vae is not None and job.out_image is not None:
                image = self._decoded(vae, latents, image, job.out_image)
                io.write("out_image", job.out_image, image.clamp(-1.0, 1.0))
                clock.lap("decode")
            if self._is_leader:
                self._components.check_unchanged(transformer)
                io.write("out_latents", job.out_latents, latents)
                clock.lap("outputs")
        return {**clock.marks_ms, "first_step": progress.first_step_ms}

    def _previews_of(self, job: Generate, io: OpenIo) -> Callable[[torch.Tensor], None] | None:
        """What writes each step's prediction of the clean latents, where the client wants to see them.

        It waits for the step, so the host does not run ahead of the GPU as it does without. Every rank gets one, since
        all have to know; rank 0's alone writes.
        """
        place = job.out_denoised
        if place is None:
            return None
        io.check("out_denoised", place, job.out_latents.shape)
        return lambda denoised: io.write("out_denoised", place, denoised) if self._is_leader else None

    def _vae_for(self, job: Generate) -> Component | None:
        if (job.vae_id is None) != (job.out_image is None):
            raise BadRequest("generate: vae_id and out_image come together: without a VAE there is no image")
        return None if job.vae_id is None else self._components.get(job.vae_id, "vae")

    def _denoise(self, job: Denoise, open_io: Callable[[], OpenIo], client: ProcessIdentity) -> dict[str, float]:
        clock = _Laps(self._device)
        with together():
            transformer = self._components.get(job.transformer_id, "transformer")
            skeleton = transformer.plan.skeleton
            clock.lap("plug", waits=False)
            io = open_io()
            io.check("out", job.out, job.latents.shape)
            rows = sum(part.rows for part in job.parts)
            if (rows, rows) != (job.latents.shape[0] if job.latents.shape else 0, len(job.timestep)):
                raise BadRequest(
                    f"parts: {rows} rows, but latents are {list(job.latents.shape)} with {len(job.timestep)} "
                    "timesteps; give one row for each image"
                )
            latents = io.read("latents", job.latents, self._device)
            conditionings = [self._condition(skeleton, part, io, client) for part in job.parts]
        clock.lap("inputs", waits=False)
        batches: list[pipelines.Batch] = []
        done = 0
        for conditioning, guidance in _joined(job.parts, conditionings):
            end = done + conditioning.prompt_embeds.shape[0]
            timestep = torch.tensor(job.timestep[done:end], dtype=torch.float32)
            times = _times(job, slice(done, end), guidance)
            batches.append(pipelines.Batch(latents[done:end], timestep, conditioning, guidance, times))
            done = end
        prediction = pipelines.denoise_batches(skeleton, batches, job.variant)
        finite = FiniteCheck()
        if self._is_leader:
            finite.note(f"prediction at sigma {_span(job.timestep)}", prediction)
            finite.fetch()
        clock.lap("forward")
        if self._is_leader:
            self._check_finite(finite, transformer, torch_dtype(job.out.dtype))
            self._components.check_unchanged(transformer)
            io.write("out", job.out, prediction)
            clock.lap("outputs", waits=False)
        return clock.marks_ms

    def _condition(self, skeleton: Skeleton, part: Part, io: OpenIo, client: ProcessIdentity) -> Conditioning:
        """Read and check the conditioning of a part, or find what was kept of an earlier one."""
        if part.prompt_embeds is None or part.pooled_prompt_embeds is None:
            if part.conditioning_id is None:
                raise BadRequest("parts: prompt_embeds and pooled_prompt_embeds, or a conditioning_id, are needed")
            found = self._kept.find(client, part.conditioning_id, skeleton.dtype)
        else:
            found = pipelines.condition(
                skeleton,
                prompt_embeds=io.read("prompt_embeds", part.prompt_embeds, self._device),
                pooled=io.read("pooled_prompt_embeds", part.pooled_prompt_embeds, self._device),
            )
            if part.conditioning_id is not None:
                self._kept.keep(client, part.conditioning_id, skeleton.dtype, found)
        given = found.prompt_embeds.shape[0]
        if given not in (1, part.rows):
            raise BadRequest(f"prompt_embeds: {given} rows for {part.rows} images; give one, or one for each image")
        return found.repeated(part.rows)

    def _decode(self, job: Decode, open_io: Callable[[], OpenIo]) -> dict[str, float]:
        clock = _Laps(self._device)
        with together():
            vae = self._components.get(job.vae_id, "vae")
            clock.lap("plug")
            io = open_io()
            latents = io.read("latents", job.latents, self._device)
        clock.lap("inputs")
        image = self._decode_by_all(vae, latents)
        with together():
            if self._is_leader:
                io.write("out", job.out, self._decoded(vae, latents, image, job.out))
                clock.lap("decode")
        return clock.marks_ms

    def _decode_by_all(self, vae: Component, latents: torch.Tensor) -> torch.Tensor | None:
        """Decode on all ranks, or leave a small image to rank 0, which does it sooner alone.

        Not inside ``together``: ranks meet many times in there, and whoever runs out of memory meets nobody any more.
        The rank then ends, and the group with it, as in a step.
        """
        if latents.ndim != 4 or not self._bands.fit(*latents.shape[2:]):
            return None
        return image_coding.decode(vae.plan.skeleton, latents, clamp=False, bands=self._bands)

    def _decoded(
        self, vae: Component, latents: torch.Tensor, image: torch.Tensor | None, place: IoTensor
    ) -> torch.Tensor:
        """Return the image that all ranks have decoded, or decode it on this one, and check it, not cut off yet."""
        if image is None:
            with with_every_core(self._device):
                image = image_coding.decode(vae.plan.skeleton, latents, clamp=False)
        finite = FiniteCheck()
        finite.note("image", image)
        self._check_finite(finite, vae, torch_dtype(place.dtype))
        self._components.check_unchanged(vae)
        return image

    def _check_finite(self, finite: FiniteCheck, component: Component, *into: torch.dtype) -> None:
        """Refuse results that are not finite.

        Raises:
            StaleSource: because the component's weights were changed.
            NotFinite: they were not.
        """
        fault = finite.fault(component, *into)
        if fault is not None:
            self._components.check_unchanged(component)
            raise fault

    def _encode(self, job: Encode, open_io: Callable[[], OpenIo]) -> dict[str, float]:
        clock = _Laps(self._device)
        with together():
            vae = self._components.get(job.vae_id, "vae")
            clock.lap("plug")
            io = open_io()
            image = io.read("image", job.image, self._device)
            if image.ndim == 4 and image.shape[-1] == IMAGE_CHANNELS:
                image = image.movedim(-1, 1)  # computed in the layout in which it came
            if self._is_leader:
                clock.lap("inputs")
                with with_every_core(self._device):
                    latents = image_coding.encode(vae.plan.skeleton, image)
                finite = FiniteCheck()
                finite.note("latents", latents)
                self._check_finite(finite, vae, torch_dtype(job.out.dtype))
                self._components.check_unchanged(vae)
                io.write("out", job.out, latents)
                clock.lap("encode")
        return clock.marks_ms

    def _encode_text(self, job: EncodeText, open_io: Callable[[], OpenIo]) -> dict[str, float]:
        clock = _Laps(self._device)
        with together():
            component = self._components.get(job.encoder_id, "text_encoder")
            encoder = component.plan.skeleton
            clock.lap("plug")
            io = open_io()
            token_ids = io.read("token_ids", job.token_ids)
            width = text_encoding.check_token_ids(encoder, token_ids).width
            io.check("out", job.out, (*token_ids.shape, width))
            if job.out_pooled is not None:
                io.check("out_pooled", job.out_pooled, (token_ids.shape[0], width))
            if self._is_leader:
                clock.lap("inputs")
                with with_every_core(self._device):
                    hidden, pooled = text_encoding.encode_text(encoder, token_ids, pooled=job.out_pooled is not None)
                finite = FiniteCheck()
                finite.note("hidden states", hidden)  # pooled ones are some of them
                finite.fetch()
                clock.lap("encode_text")
                places = [job.out, *([] if job.out_pooled is None else [job.out_pooled])]
                self._check_finite(finite, component, *(torch_dtype(place.dtype) for place in places))
                self._components.check_unchanged(component)
                io.write("out", job.out, hidden)
                if job.out_pooled is not None and pooled is not None:
                    io.write("out_pooled", job.out_pooled, pooled)
                clock.lap("outputs")
        return clock.marks_ms


def _joined(
    parts: tuple[Part, ...], conditionings: list[Conditioning]
) -> Iterator[tuple[Conditioning, torch.Tensor | None]]:
    """Join neighbours of as many text tokens into one forward each, with one guidance for each image."""
    for _, group in groupby(zip(parts, conditionings, strict=True), key=lambda pair: pair[1].prompt_embeds.shape[1]):
        members = list(group)
        scales = [part.guidance for part, _ in members for _ in range(part.rows)]
        guidance = torch.tensor([scale for scale in scales if scale is not None])
        yield (
            Conditioning(
                torch.cat([each.prompt_embeds for _, each in members]), torch.cat([each.pooled for _, each in members])
            )
            if len(members) > 1
            else members[0][1],
            guidance if len(guidance) == len(scales) else None,
        )


def _times(job: Denoise, rows: slice, guidance: torch.Tensor | None) -> Times | None:
    """When these rows are and others are to come, if the client says so and the rows are alike."""
    if not job.sigmas:
        return None
    moments = set(_rounded(job.timestep[rows]))
    scales = set() if guidance is None else set(guidance.tolist())
    if len(moments) > 1 or len(scales) > 1:
        return None
    return Times(moments.pop(), scales.pop() if scales else None, _rounded(job.sigmas))


def _span(sigmas: tuple[float, ...]) -> str:
    least, most = min(sigmas), max(sigmas)
    return f"{most:g}" if least == most else f"{most:g} to {least:g}"


def _rounded(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """Round to float32, as timesteps are: equal ones then are, however the client came by them."""
    return tuple(torch.tensor(sigmas, dtype=torch.float32).tolist())


def _latent_shape(batch: int, height: int, width: int) -> tuple[int, ...]:
    return (batch, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)


class _Laps(Clock):
    """A lap is a mark; one that waits for the GPU charges the phase with its own work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def lap(self, phase: str, *, waits: bool = True) -> None:
        if waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.mark(phase)
