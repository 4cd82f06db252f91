"""The ``Decode`` job, latents to images; ``Generate`` decodes by the same functions."""

from __future__ import annotations

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc.facts import LatentScaling
from xditd.ipc.requests import Decode
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.tensor_views import torch_dtype


def run(job: Decode, context: JobContext) -> Finished:
    """Decode latents; rank 0 writes the image."""
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        vae = context.components.get(job.vae_id, "vae")
        clock.end_phase("plug")
        io = context.open_io()
        latents = io.read("latents", job.latents, context.device)
        scaling = job.scaling or vae.vae_facts.latents.scaling
    clock.end_phase("inputs")
    image = decode_on_all_ranks(vae, latents, scaling)
    with raise_on_all_ranks():
        if context.is_leader:
            io.write("out", job.out, finish_decode(context, vae, latents, scaling, image, job.out))
            clock.end_phase("decode")
    return Finished(clock.marks_ms)


def decode_on_all_ranks(vae: Component, latents: torch.Tensor, scaling: LatentScaling) -> torch.Tensor | None:
    """Decode on all ranks; return ``None`` for a small image, which rank 0 decodes faster alone.

    Do not call it inside ``raise_on_all_ranks``: it has many collectives, and a rank that runs out of memory reaches
    none of the later ones. That rank ends, and the group with it, as in a step.
    """
    model = vae.model
    operations = model.operations_for("vae")
    if not operations.shares(model, latents):
        return None
    return operations.decode(model, latents, scaling, is_shared=True)


def finish_decode(
    context: JobContext,
    vae: Component,
    latents: torch.Tensor,
    scaling: LatentScaling,
    image: torch.Tensor | None,
    into: IoTensor,
) -> torch.Tensor:
    """Return ``image``, or decode it on this rank if it is ``None``; check it. Values are not clamped."""
    if image is None:
        with using_all_cores(context.device):
            model = vae.model
            image = model.operations_for("vae").decode(model, latents, scaling, is_shared=False)
    finite = FiniteCheck()
    finite.note("image", image)
    context.check_finite(finite, vae, torch_dtype(into.dtype))
    context.components.check_unchanged(vae)
    return image
