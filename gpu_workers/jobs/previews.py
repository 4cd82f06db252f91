"""Previews of a generation: the predicted clean latents of each step, and an image of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Final

import torch

from xditd.gpu_workers.jobs.context import JobContext
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.job_checks import check_output
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import Generate

OnDenoised = Callable[[torch.Tensor], None]

_VIDEO_DIMENSIONS: Final = 5
_FRAMES: Final = 2


def check_previews(job: Generate, io: OpenIo, batch: int, vae: Component | None) -> None:
    """Check the place of the image.

    Raises:
        BadRequest: there is no VAE, or the place has another shape or dtype.
    """
    if job.out_preview is None:
        return
    if vae is None:
        raise BadRequest("generate: out_preview without a vae: name one among the components")
    io.check(
        "out_preview",
        job.out_preview,
        (batch, vae.vae_facts.image_channels, job.sampling.height, job.sampling.width),
    )
    check_output("out_preview", job.out_preview.dtype)


def preview_writer(
    job: Generate, context: JobContext, io: OpenIo, transformer: Component, vae: Component | None
) -> OnDenoised | None:
    """Return a function that writes each step's previews, or ``None`` if the client wants none.

    Writing waits for the step, so the host no longer runs ahead of the GPU. Every rank gets a function, and all call it
    together; only rank 0's writes.
    """
    where, image_at = job.out_denoised, job.out_preview
    if where is None and image_at is None:
        return None

    def write(denoised: torch.Tensor) -> None:
        if where is not None and context.is_leader:
            io.write("out_denoised", where, denoised)
        if image_at is not None and vae is not None:
            image = _decoded(context, _middle_frame(denoised), transformer, vae)
            if context.is_leader and image is not None:
                io.write("out_preview", image_at, image.clamp(-1.0, 1.0))

    return write


def _middle_frame(latents: torch.Tensor) -> torch.Tensor:
    """Return (batch, channels, height, width): of a video its middle frame, without those before it."""
    return latents[:, :, latents.shape[_FRAMES] // 2] if latents.ndim == _VIDEO_DIMENSIONS else latents


def _decoded(context: JobContext, latents: torch.Tensor, transformer: Component, vae: Component) -> torch.Tensor | None:
    """Decode on all ranks, or on rank 0 alone, the others get ``None``.

    Raises:
        NotFinite, StaleSource: the latents are not finite; on every rank.
    """
    model, scaling = vae.model, transformer.transformer_facts.latents.scaling
    operations = model.operations_for("vae")
    finite = FiniteCheck()
    finite.note("predicted clean latents", latents)

    def decode(*, is_shared: bool) -> torch.Tensor:
        with closing(operations.decode(model, latents, scaling, is_shared=is_shared)) as chunks:
            return next(chunks)

    found = None
    with raise_on_all_ranks():
        context.check_finite(finite, transformer, vae.match.dtype)
        is_shared = operations.shares(model, latents)
        if not is_shared and context.is_leader:
            with using_all_cores(context.device):
                found = decode(is_shared=False)
    return decode(is_shared=True) if is_shared else found
