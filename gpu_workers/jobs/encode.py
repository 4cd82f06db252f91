"""The ``Encode`` job: images and videos to latents."""

from __future__ import annotations

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc.facts import LatentScaling
from xditd.ipc.requests import Encode
from xditd.ipc.transports.tensor_views import torch_dtype


def run(job: Encode, context: JobContext) -> Finished:
    """Encode an image, channels first or last, and write the latents."""
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        vae = context.components.get(job.vae_id, "vae")
        facts, model = vae.vae_facts, vae.model
        clock.end_phase("plug")
        io = context.open_io()
        image = io.read("image", job.image, context.device)
        if image.ndim == 4 and image.shape[-1] == facts.image_channels:
            image = image.movedim(-1, 1)  # a view: the memory format stays
        is_shared = model.operations_for("vae").shares_encode(model, image)
        scaling = job.scaling or facts.latents.scaling
    clock.end_phase("inputs")
    # Not inside raise_on_all_ranks: it has many collectives, as a decode.
    shared = model.operations_for("vae").encode(model, image, scaling, is_shared=True) if is_shared else None
    with raise_on_all_ranks():
        if context.is_leader:
            latents = _encode(context, vae, image, scaling) if shared is None else shared
            finite = FiniteCheck()
            finite.note("latents", latents)
            context.check_finite(finite, vae, torch_dtype(job.out.dtype))
            context.components.check_unchanged(vae)
            io.write("out", job.out, latents)
            clock.end_phase("encode")
    return Finished(clock.marks_ms)


def _encode(context: JobContext, vae: Component, image: torch.Tensor, scaling: LatentScaling) -> torch.Tensor:
    """Encode on this rank alone."""
    with using_all_cores(context.device):
        return vae.model.operations_for("vae").encode(vae.model, image, scaling)
