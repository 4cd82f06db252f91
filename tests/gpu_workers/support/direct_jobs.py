"""For tests and their programs: run jobs on plugged models, without a daemon, messages or I/O blocks.

FLUX.1's forward takes packed latents; :func:`denoise` packs and unpacks them as diffusers' pipeline does. Import this
once the group is started: until then there is no xfuser to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import FluxPipeline

from xditd.gpu_workers.families.flux1.config import PATCH
from xditd.gpu_workers.jobs.generate import Loop, SecondStage
from xditd.gpu_workers.jobs.generation_inputs import to_wanted
from xditd.gpu_workers.jobs.pictures import pictures_of
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.calls import run_parts
from xditd.gpu_workers.models.controls import Control
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.lora_variants import LoraVariant
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.ipc.facts import LatentScaling
from xditd.ipc.job_parts import Sampling


def plugged(cache: ModelCache, state: Mapping[str, torch.Tensor]) -> CachedModel:
    """Match a checkpoint, and plug its tensors into its model."""
    match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    match.model.plug(match.bind(state))
    return match.model


@dataclass(frozen=True)
class DirectControls:
    """ControlNets that run in every step: each model with its picture's arguments and its scale."""

    given: Sequence[tuple[CachedModel, Mapping[str, Any], float]] = ()

    @classmethod
    def of(cls, *given: tuple[CachedModel, torch.Tensor, int | None, float]) -> DirectControls:
        """Take latents (batch, 16, height, width) of pictures and their modes."""
        return cls(
            [
                (model, model.operations_for("controlnet").picture(model, latents, mode), scale)
                for model, latents, mode, scale in given
            ]
        )

    def add(self, parts: Sequence[Inputs], _: int) -> list[Inputs]:
        return [replace(part, controls=tuple(self._beside(part))) for part in parts]

    def _beside(self, part: Inputs) -> Iterator[Control]:
        for model, picture, scale in self.given:
            yield Control(model, model.operations_for("controlnet").beside(model.config, part, picture), scale)


@torch.inference_mode()
def generate_from(
    model: CachedModel,
    conditioning: Mapping[str, Any],
    noise: torch.Tensor,
    *,
    on_step: Callable[[int, int], None] = lambda *_: None,
    on_denoised: Callable[[torch.Tensor], None] | None = None,
    step_cache: StepCache | None = None,
    finite: FiniteCheck | None = None,
    variant: str = "class",
    is_foreseen: bool = True,
    loras: tuple[tuple[int, float], ...] = (),
    second: CachedModel | None = None,
    vae: CachedModel | None = None,
    switched_on: LoraVariant | None = None,
    controls: DirectControls = DirectControls(),
    **sampling: Any,
) -> torch.Tensor:
    """Run the loop of ``Generate`` on a model of any family; arguments are those of ``Sampling``.

    ``vae`` encodes pictures among the conditioning. ``switched_on`` are LoRAs that the loop switches on, with their
    strengths by step; ``loras`` those of all steps.

    ``step_cache.reused`` is counted over all halves of the group afterwards. Where it ``is_foreseen``, as in jobs, the
    forwards are told of those to come, which changes no bit.
    """
    operations: Any = model.operations
    facts = operations.facts(model.config, model.layout)
    wanted = to_wanted(Sampling(variant=variant, **sampling), noise.shape[0], facts)
    wanted = replace(wanted, stages=1 if second is None else 2, vae_dtype=None if vae is None else vae.dtype)
    operations.recipe.check(model.config, wanted)
    pictures = pictures_of(operations.recipe, model.config, wanted, conditioning)
    if vae is not None:
        conditioning = {**conditioning, **{name: encode(vae, each).float() for name, each in pictures.items()}}
    noise = noise.to(model.device, operations.recipe.noise_dtype(model.dtype, variant))
    started = operations.recipe.start(model, wanted, conditioning, noise)
    options = CallOptions(variant, started.foreseen if is_foreseen else {}, step_cache, loras)
    then = None if second is None else SecondStage(second)
    loop = Loop(model, operations, started, options, wanted.batch, wanted.steps, switched_on, second=then)
    loop.controls = cast(Any, controls)
    result = loop.run(finite or FiniteCheck(), on_step, on_denoised)
    if step_cache is not None:
        step_cache.reused = loop.reused_steps
    return result


def generate(
    model: CachedModel,
    *,
    prompt_embeds: torch.Tensor,
    pooled: torch.Tensor,
    noise: torch.Tensor,
    sigmas: Sequence[float] | None = None,
    **given: Any,
) -> torch.Tensor:
    """Run FLUX.1's loop."""
    conditioning = {
        "prompt_embeds": prompt_embeds.to(model.device),
        "pooled_prompt_embeds": pooled.to(model.device),
    }
    return generate_from(model, conditioning, noise, sigmas=None if sigmas is None else tuple(sigmas), **given)


@torch.inference_mode()
def call(
    model: CachedModel, parts: Sequence[Inputs], *, variant: str = "class", foreseen: Mapping[str, Any] | None = None
) -> list[Any]:
    """Check forwards and run them; the results are their classes' trees."""
    operations: Any = model.operations
    for part in parts:
        operations.check(model, part)
    found = run_parts(model, operations, parts, CallOptions(variant, foreseen or {}))
    return [operations.tree(rows) for rows in found]


def flux1_inputs(
    model: CachedModel,
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled: torch.Tensor,
    guidance: torch.Tensor | None = None,
) -> Inputs:
    """FLUX.1's arguments for latents (rows, 16, height, width), one sigma each."""
    device, dtype = model.device, model.dtype
    height, width = latents.shape[2:]
    given: dict[str, Any] = {
        "hidden_states": FluxPipeline._pack_latents(latents.to(device, dtype).contiguous(), *latents.shape),
        "encoder_hidden_states": prompt_embeds.to(device, dtype),
        "pooled_projections": pooled.to(device, dtype),
        "timestep": timestep.to(device, torch.float32),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height // PATCH, width // PATCH, device, torch.float32),
        "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device),
    }
    known = {"timestep": tuple(timestep.float().tolist())}
    if guidance is not None:
        given["guidance"] = guidance.to(device, torch.float32)
        known["guidance"] = tuple(guidance.float().tolist())
    return Inputs(given, known)


def denoise(
    model: CachedModel,
    *,
    latents: torch.Tensor,
    variant: str = "class",
    foreseen: Mapping[str, Any] | None = None,
    **given: Any,
) -> torch.Tensor:
    """Run FLUX.1's forward once on latents (rows, 16, height, width), and return the velocity, shaped as they are."""
    return denoise_parts(model, [{"latents": latents, **given}], variant=variant, foreseen=foreseen)


def denoise_parts(model: CachedModel, parts: Sequence[Mapping[str, Any]], **options: Any) -> torch.Tensor:
    """Run FLUX.1's forward for parts with latents of one size, in one call, and return the velocities of all rows."""
    size = parts[0]["latents"].shape[2:]
    trees = call(model, [flux1_inputs(model, **part) for part in parts], **options)
    result: torch.Tensor = FluxPipeline._unpack_latents(torch.cat([packed for (packed,) in trees]), *size, 1)
    return result


def decode(
    model: CachedModel, latents: torch.Tensor, *, scaling: LatentScaling | None = None, is_shared: bool = False
) -> torch.Tensor:
    """Decode, not clamped to [-1, 1]: on this rank alone, or split over the ranks, however small the image.

    Without ``scaling``, here and in :func:`encode`, it is that of the VAE's facts.
    """
    operations: Any = model.operations
    scaling = scaling or operations.facts(model.config).latents.scaling
    chunks = list(operations.decode(model, latents.to(model.device), scaling, is_shared=is_shared))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)


def encode(
    model: CachedModel, image: torch.Tensor, *, scaling: LatentScaling | None = None, is_shared: bool = False
) -> torch.Tensor:
    """Encode images to latents, as :func:`decode` decodes."""
    operations: Any = model.operations
    scaling = scaling or operations.facts(model.config).latents.scaling
    latents: torch.Tensor = operations.encode(model, image.to(model.device), scaling, is_shared=is_shared)
    return latents


def encode_text(
    model: CachedModel, token_ids: torch.Tensor, *, pooled: bool = False, **given: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode token ids to hidden states, and pooled ones if asked for; ``given`` are a mask and layers."""
    operations: Any = model.operations
    encoded: tuple[torch.Tensor, torch.Tensor | None] = operations.encode(model, token_ids, pooled=pooled, **given)
    return encoded
