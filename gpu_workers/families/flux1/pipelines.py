"""What jobs do with a plugged transformer: ``generate``, ``condition``, ``denoise``. No I/O.

Latents here are always (batch, 16, height / 8, width / 8); packing into tokens happens inside. In a group every
rank calls the same function with the same arguments, and every rank gets the whole result. Inputs may be on
any device; results are on the skeleton's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.utils.torch_utils import randn_tensor
from xfuser.core.distributed import get_sequence_parallel_world_size

from xditd.gpu_workers.families.flux1.conditionings import Conditioning, check_conditioning
from xditd.gpu_workers.families.flux1.config import LATENT_CHANNELS, PATCH, PIXELS_PER_LATENT, Flux1Config
from xditd.gpu_workers.families.flux1.modulations import Times
from xditd.gpu_workers.families.flux1.sequence_parallel import SequenceParallelFlux1
from xditd.gpu_workers.models.job_checks import check_generate, check_shape, prepare
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.skeletons import Skeleton
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.gpu_workers.parallel import component_layouts
from xditd.gpu_workers.parallel.row_shares import add_halves, gather_rows, own_rows
from xditd.gpu_workers.parallel.token_shares import deal_tokens
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_BATCH, MAX_SIDE_PIXELS
from xditd.ipc.requests import Variant

OnStep = Callable[[int, int], None]
OnDenoised = Callable[[torch.Tensor], None]


class _Watched(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler, which also says what each step takes the clean latents for."""

    denoised: torch.Tensor

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *given: Any, **more: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        self.denoised = sample.float() - self.sigmas[self.step_index] * model_output.float()
        return super().step(model_output, timestep, sample, *given, **more)


class _Pipeline(FluxPipeline):
    """diffusers' pipeline, told where it runs: it would ask all 1,200 modules, before the first step of each job."""

    @property
    def _execution_device(self) -> torch.device:
        return cast(torch.device, self.transformer.x_embedder.weight.device)

    def prepare_latents(
        self,
        batch_size: int,
        channels: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None,
        latents: torch.Tensor | None = None,
    ) -> Any:
        """Leave given latents in their dtype, and positions too, where diffusers casts them to that of the prompts."""
        own = dtype if latents is None else latents.dtype
        return super().prepare_latents(batch_size, channels, height, width, own, device, generator, latents)


class Batch(NamedTuple):
    """What one forward of the transformer takes: rows of as many text tokens, on any device.

    ``latents`` is (rows, 16, height / 8, width / 8). ``timestep``, (rows,), is the sigma of each row, in [0, 1];
    ``guidance``, (rows,), the guidance scale of each, needed by models with guidance (dev) and ignored by others.
    ``conditioning`` has a row for each, and comes from :func:`condition` for this skeleton: it is not checked again.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    conditioning: Conditioning
    guidance: torch.Tensor | None
    times: Times | None = None
    """Where the host knows the timestep of all rows, and those of forwards to come: less is computed then, to the same
    bits."""

    def rows(self, rows: slice) -> Batch:
        """Some of the rows, as views."""
        return Batch(
            self.latents[rows],
            self.timestep[rows],
            Conditioning(self.conditioning.prompt_embeds[rows], self.conditioning.pooled[rows]),
            None if self.guidance is None else self.guidance[rows],
            self.times,
        )


def seeded_noise(seed: int, *, batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the noise that a diffusers pipeline draws for ``torch.Generator("cpu").manual_seed(seed)``, unpacked.

    On the CPU, shape (batch, 16, height / 8, width / 8); the same on every machine.
    """
    check_generate(height=height, width=width, steps=1)
    if not 0 <= seed < 2**64:
        raise BadRequest(f"seed {seed}: use 0 to 2**64 - 1")
    if not 1 <= batch <= MAX_BATCH:
        raise BadRequest(f"batch {batch}: use 1 to {MAX_BATCH}")
    shape = (batch, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    generator = torch.Generator("cpu").manual_seed(seed)
    return cast(torch.Tensor, randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=dtype))


@torch.inference_mode()
def generate(
    skeleton: Skeleton,
    *,
    prompt_embeds: torch.Tensor,
    pooled: torch.Tensor,
    noise: torch.Tensor,
    height: int,
    width: int,
    steps: int,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float = 3.5,
    on_step: OnStep | None = None,
    on_denoised: OnDenoised | None = None,
    step_cache: StepCache | None = None,
    variant: Variant = "class",
    finite: FiniteCheck | None = None,
) -> torch.Tensor:
    """Denoise ``noise`` in ``steps`` steps and return the latents, in the dtype that they have between steps.

    That is the skeleton's, or float32 where the ``variant`` keeps timesteps and latents in float32.

    ``prompt_embeds`` is (batch, tokens, text channels), ``pooled`` (batch, pooled channels). The schedule is
    diffusers' for this model unless ``sigmas`` are given, which are used as they are: no shift is applied and the
    final 0 is appended. ``guidance_scale`` is ignored by models without guidance (schnell). ``on_step(done, total)``
    runs on the host after each step was issued, which on a GPU is before it has finished; what it raises ends the job.
    ``on_denoised`` runs before it, with the clean latents as predicted at that step, in float32. All ranks give one, or
    none. ``step_cache``, a new one for each job, spares steps and says how many. ``finite`` notes the latents after
    every step, the same on every rank.

    Raises:
        BadRequest: sizes, shapes, steps, sigmas, or values that are not finite.
        Unsupported: too few tokens for the group.
    """
    config = _transformer_config(skeleton)
    check_generate(height=height, width=width, steps=steps, sigmas=sigmas, guidance_scale=guidance_scale)
    batch = check_conditioning(config, prompt_embeds, pooled)
    check_shape("noise", noise, (batch, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT))
    prompt_embeds, pooled, rounded = prepare(
        skeleton, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled, noise=noise
    )
    noise = noise.to(skeleton.device, torch.float32) if variant == "float32_time" else rounded

    def show(denoised: torch.Tensor) -> None:
        if on_denoised is not None:
            on_denoised(_unpack(denoised.float(), height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT))

    def report(_: FluxPipeline, index: int, __: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if isinstance(scheduler, _Watched):
            show(scheduler.denoised)
        if finite is not None:
            finite.note(f"latents after step {index + 1} of {steps}", tensors["latents"])
        if on_step is not None:
            on_step(index + 1, steps)
        return tensors

    component_layouts.use(skeleton.layout)
    schedule = dict(config.scheduler) if sigmas is None else {"shift": 1.0, "use_dynamic_shifting": False}
    scheduler = (FlowMatchEulerDiscreteScheduler if on_denoised is None else _Watched)(**schedule)
    pipeline = _pipeline(skeleton, scheduler)
    module = cast(SequenceParallelFlux1, skeleton.module)
    with module.stepping(scheduler), module.caching(step_cache), module.following(variant):
        packed = pipeline(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            latents=_pack(noise),
            height=height,
            width=width,
            num_inference_steps=steps,
            sigmas=None if sigmas is None else list(sigmas),
            guidance_scale=guidance_scale,
            callback_on_step_end=report,
            output_type="latent",
            return_dict=False,
        )[0]
    if step_cache is not None:
        step_cache.reused = add_halves(step_cache.reused, batch)
    return _unpack(packed, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)


@torch.inference_mode()
def condition(skeleton: Skeleton, *, prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> Conditioning:
    """Check text conditioning for a transformer, and move it there; :func:`denoise` then takes it as it is.

    Raises:
        BadRequest: shapes, or values that are not finite in the transformer's dtype.
    """
    check_conditioning(_transformer_config(skeleton), prompt_embeds, pooled)
    return Conditioning(*prepare(skeleton, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled))


@torch.inference_mode()
def denoise(
    skeleton: Skeleton,
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
    guidance: torch.Tensor | None = None,
    variant: Variant = "class",
) -> torch.Tensor:
    """Run the transformer once and return its prediction (the velocity), shaped as ``latents``: see :class:`Batch`.

    It has the skeleton's dtype. ``variant`` says how the timestep is rounded.

    Raises:
        BadRequest: shapes, a sigma outside [0, 1], or values that are not finite.
        Unsupported: too few tokens for the group.
    """
    return denoise_batches(skeleton, [Batch(latents, timestep, conditioning, guidance)], variant)


@torch.inference_mode()
def denoise_batches(skeleton: Skeleton, batches: Sequence[Batch], variant: Variant = "class") -> torch.Tensor:
    """Run the transformer on every row of some batches of one size, and return the predictions of all, in order.

    Halves of a group deal the rows of all batches between them, so that a prompt and a negative one of another length
    run at the same time, too.

    Raises:
        BadRequest, Unsupported: as :func:`denoise`, for any batch, before any is launched: so on every rank alike.
    """
    checked = [_check_batch(skeleton, batch) for batch in batches]
    component_layouts.use(skeleton.layout)
    rows = sum(batch.latents.shape[0] for batch in checked)
    own = own_rows(rows)
    predictions: list[torch.Tensor] = []
    done = 0
    for batch in checked:
        size = batch.latents.shape[0]
        mine = slice(max(own.start - done, 0), min(own.stop - done, size))
        if mine.start < mine.stop:
            predictions.append(_predict(skeleton, batch.rows(mine), variant))
        done += size
    return gather_rows(predictions[0] if len(predictions) == 1 else torch.cat(predictions), rows)


def _check_batch(skeleton: Skeleton, batch: Batch) -> Batch:
    """Refuse what cannot run, and move the rest to the skeleton's device."""
    latents, timestep, conditioning, guidance, times = batch
    config = _transformer_config(skeleton)
    rows, text_tokens = conditioning.prompt_embeds.shape[:2]
    if latents.ndim != 4 or latents.shape[2] % PATCH or latents.shape[3] % PATCH or 0 in latents.shape:
        raise BadRequest(f"latents are {list(latents.shape)}: use [batch, {LATENT_CHANNELS}, even height, even width]")
    height, width = latents.shape[2:]
    if max(height, width) * PIXELS_PER_LATENT > MAX_SIDE_PIXELS:
        raise BadRequest(f"latents are {list(latents.shape)}: more than {MAX_SIDE_PIXELS} pixels on a side")
    check_shape("latents", latents, (rows, LATENT_CHANNELS, height, width))
    check_shape("timestep", timestep, (rows,))
    if config.has_guidance:
        if guidance is None:
            raise BadRequest("guidance is missing: this model has guidance_in; give one number for each sample")
        check_shape("guidance", guidance, (rows,))
    else:
        guidance = None
    deal_tokens(text_tokens, (height // PATCH) * (width // PATCH), get_sequence_parallel_world_size())
    (latents,) = prepare(
        skeleton,
        latents=latents,
        checked=((timestep, "timestep", 0.0, 1.0), (guidance, "guidance", -math.inf, math.inf)),
    )
    # Both stay float32 as in FluxPipeline; the model rounds them as the variant says.
    return Batch(
        latents,
        timestep.to(skeleton.device, torch.float32),
        conditioning,
        None if guidance is None else guidance.to(skeleton.device, torch.float32),
        times,
    )


def _predict(skeleton: Skeleton, batch: Batch, variant: Variant) -> torch.Tensor:
    height, width = batch.latents.shape[2:]
    module = cast(SequenceParallelFlux1, skeleton.module)
    with module.foreseeing(batch.times), module.following(variant):
        prediction = module.forward_rows(
            _pack(batch.latents),
            batch.conditioning.prompt_embeds,
            pooled_projections=batch.conditioning.pooled,
            timestep=batch.timestep,
            guidance=batch.guidance,
            txt_ids=_text_ids(batch.conditioning.prompt_embeds.shape[1], skeleton.device),
            img_ids=_image_ids(height // PATCH, width // PATCH, skeleton.device),
        )
    return _unpack(prediction, height, width)


def _transformer_config(skeleton: Skeleton) -> Flux1Config:
    if not isinstance(skeleton.config, Flux1Config):
        raise BadRequest(f"the job needs a transformer, but the component is a {skeleton.family.kind}")
    return skeleton.config


def _pipeline(skeleton: Skeleton, scheduler: FlowMatchEulerDiscreteScheduler) -> FluxPipeline:
    pipeline = _Pipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=skeleton.module,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pack(latents: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, FluxPipeline._pack_latents(latents.contiguous(), *latents.shape))


def _unpack(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return cast(torch.Tensor, FluxPipeline._unpack_latents(packed, height, width, 1))


@lru_cache(maxsize=16)
def _text_ids(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(tokens, 3, device=device)


@lru_cache(maxsize=16)
def _image_ids(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Positions of image tokens, kept because sampling calls :func:`denoise` for the same size many times."""
    return cast(
        torch.Tensor, FluxPipeline._prepare_latent_image_ids(1, rows, columns, device=device, dtype=torch.float32)
    )
