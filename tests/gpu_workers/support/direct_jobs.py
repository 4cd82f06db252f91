"""For tests and programs beside them: what jobs do with plugged skeletons, without a daemon, messages or I/O blocks.

FLUX.1's forward takes packed latents; :func:`denoise` packs and unpacks them as diffusers' pipeline does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xditd.gpu_workers.families.flux1.config import PATCH
from xditd.gpu_workers.jobs.generate import Loop, wanted_of
from xditd.gpu_workers.models.calls import run_parts
from xditd.gpu_workers.models.family import CallOptions, Inputs
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.skeletons import Skeleton
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.ipc.requests import Sampling


@torch.inference_mode()
def generate_from(
    skeleton: Skeleton,
    conditioning: Mapping[str, Any],
    noise: torch.Tensor,
    *,
    on_step: Callable[[int, int], None] = lambda *_: None,
    on_denoised: Callable[[torch.Tensor], None] | None = None,
    step_cache: StepCache | None = None,
    finite: FiniteCheck | None = None,
    variant: str = "class",
    **sampling: Any,
) -> torch.Tensor:
    """Run the loop of ``Generate`` on a skeleton of any family; arguments are those of ``Sampling``."""
    operations: Any = skeleton.operations
    facts = operations.facts(skeleton.config, skeleton.layout)
    wanted = wanted_of(Sampling(variant=variant, **sampling), noise.shape[0], facts)
    operations.recipe.check(skeleton.config, wanted)
    noise = noise.to(skeleton.device, operations.recipe.noise_dtype(skeleton.dtype, variant))
    started = operations.recipe.start(skeleton, wanted, conditioning, noise)
    options = CallOptions(variant, started.foreseen, step_cache)
    loop = Loop(skeleton, operations, started, options, wanted.batch, wanted.steps)
    result = loop.run(finite or FiniteCheck(), on_step, on_denoised)
    if step_cache is not None:
        step_cache.reused = loop.reused_steps
    return result


def generate(
    skeleton: Skeleton,
    *,
    prompt_embeds: torch.Tensor,
    pooled: torch.Tensor,
    noise: torch.Tensor,
    sigmas: Sequence[float] | None = None,
    **given: Any,
) -> torch.Tensor:
    """Run FLUX.1's loop."""
    conditioning = {
        "prompt_embeds": prompt_embeds.to(skeleton.device),
        "pooled_prompt_embeds": pooled.to(skeleton.device),
    }
    return generate_from(skeleton, conditioning, noise, sigmas=None if sigmas is None else tuple(sigmas), **given)


def call(
    skeleton: Skeleton, parts: Sequence[Inputs], *, variant: str = "class", foreseen: Mapping[str, Any] | None = None
) -> list[Any]:
    """Check forwards and run them; the results are their classes' trees."""
    operations: Any = skeleton.operations
    with torch.inference_mode():
        for part in parts:
            operations.check(skeleton, part)
        found = run_parts(skeleton, operations, parts, CallOptions(variant, foreseen or {}))
        return [operations.tree(rows) for rows in found]


def flux1_inputs(
    skeleton: Skeleton,
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled: torch.Tensor,
    guidance: torch.Tensor | None = None,
) -> Inputs:
    """FLUX.1's arguments for latents (rows, 16, height, width), one sigma each."""
    from diffusers import FluxPipeline

    device, dtype = skeleton.device, skeleton.dtype
    rows, _, height, width = latents.shape
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


def denoise(skeleton: Skeleton, *, variant: str = "class", latents: torch.Tensor, **given: Any) -> torch.Tensor:
    """Run FLUX.1's forward once on latents (rows, 16, height, width), and return the velocity, shaped as they are."""
    from diffusers import FluxPipeline

    ((packed,),) = call(skeleton, [flux1_inputs(skeleton, latents=latents, **given)], variant=variant)
    result: torch.Tensor = FluxPipeline._unpack_latents(packed, *latents.shape[2:], 1)
    return result
