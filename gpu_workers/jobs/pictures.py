"""Pictures among the conditioning of a generation: the job's VAE encodes them, and all ranks get the latents.

A family whose recipe is a :class:`~xditd.gpu_workers.models.picture_recipes.PictureRecipe` says which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from xditd.gpu_workers.jobs.context import JobContext
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.operations import Recipe, Wanted
from xditd.gpu_workers.models.picture_recipes import PictureRecipe
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc.errors import BadRequest

Tensors = Mapping[str, torch.Tensor]
LATENTS_DTYPE = torch.float32


def pictures_of(recipe: Recipe[Any], config: Any, wanted: Wanted, conditioning: Mapping[str, Any]) -> Tensors:
    """Return the pictures that are to be encoded, by name; empty for families that take none.

    Raises:
        BadRequest: the recipe refuses them, or the job has no VAE for them.
    """
    if not isinstance(recipe, PictureRecipe):
        return {}
    found: Tensors = recipe.pictures(config, wanted, conditioning)
    if found and wanted.vae_dtype is None:
        raise BadRequest(f"{min(found)}: the workers encode it, but the job has no vae; give vae= that model's VAE")
    return found


def noise_frames(recipe: Recipe[Any], wanted: Wanted, conditioning: Mapping[str, Any]) -> int:
    """Return the frames of the noise: those of the video, and those that the recipe denoises before them."""
    return recipe.noise_frames(wanted, conditioning) if isinstance(recipe, PictureRecipe) else wanted.frames


def encode_pictures(pictures: Tensors, vae: Component, context: JobContext) -> dict[str, torch.Tensor]:
    """Encode pictures, and return their float32 latents on all ranks.

    Collective, as a decode: call it outside of ``raise_on_all_ranks``.

    Raises:
        BadRequest, Unsupported: a wrong size, or a VAE without an encoder.
        NotFinite, StaleSource: see :meth:`JobContext.check_finite`.
    """
    model, facts = vae.model, vae.vae_facts
    operations, scaling = model.operations_for("vae"), facts.latents.scaling
    found: dict[str, torch.Tensor] = {}
    for name, picture in pictures.items():
        with raise_on_all_ranks():
            is_shared = operations.shares_encode(model, picture)
            if not is_shared and context.is_leader:
                with using_all_cores(context.device):
                    found[name] = operations.encode(model, picture, scaling).to(LATENTS_DTYPE)
        if is_shared:
            found[name] = operations.encode(model, picture, scaling, is_shared=True).to(LATENTS_DTYPE)
        else:
            shape = facts.latents.shape_of(tuple(picture.shape))
            found[name] = _broadcast(found.get(name), shape, context.device)
    with raise_on_all_ranks():
        if context.is_leader:
            finite = FiniteCheck()
            for name, latents in found.items():
                finite.note(f"latents of {name}", latents)
            context.check_finite(finite, vae)
            context.components.check_unchanged(vae)
    return found


def _broadcast(mine: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return rank 0's latents on all ranks; others give none."""
    latents = torch.empty(shape, dtype=LATENTS_DTYPE, device=device) if mine is None else mine.contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(latents, src=0)
    return latents
