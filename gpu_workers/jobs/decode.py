"""``Decode``: images from latents; and the decode that ends a ``Generate``."""

from __future__ import annotations

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.models.components import Component
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.fellows import together, with_every_core
from xditd.ipc.facts import LatentScaling
from xditd.ipc.requests import Decode
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.layout import torch_dtype


def run(job: Decode, context: JobContext) -> Finished:
    """Decode latents; rank 0 writes the image."""
    clock = PhaseClock(context.device)
    with together():
        vae = context.components.get(job.vae_id, "vae")
        clock.end_phase("plug")
        io = context.open_io()
        latents = io.read("latents", job.latents, context.device)
        scaling = job.scaling or vae.vae_facts.latents.scaling
    clock.end_phase("inputs")
    image = decode_by_all(vae, latents, scaling)
    with together():
        if context.is_leader:
            io.write("out", job.out, decoded(context, vae, latents, scaling, image, job.out))
            clock.end_phase("decode")
    return Finished(clock.marks_ms)


def decode_by_all(vae: Component, latents: torch.Tensor, scaling: LatentScaling) -> torch.Tensor | None:
    """Decode on all ranks, or leave a small image to rank 0, which does it sooner alone.

    Not inside ``together``: ranks meet many times in there, and whoever runs out of memory meets nobody any more.
    The rank then ends, and the group with it, as in a step.
    """
    skeleton = vae.plan.skeleton
    operations = skeleton.operations_for("vae")
    if not operations.shares(skeleton, latents):
        return None
    return operations.decode(skeleton, latents, scaling, is_shared=True)


def decoded(
    context: JobContext,
    vae: Component,
    latents: torch.Tensor,
    scaling: LatentScaling,
    image: torch.Tensor | None,
    into: IoTensor,
) -> torch.Tensor:
    """Return the image that all ranks have decoded, or decode it on this one, and check it, not cut off yet."""
    if image is None:
        with with_every_core(context.device):
            skeleton = vae.plan.skeleton
            image = skeleton.operations_for("vae").decode(skeleton, latents, scaling, is_shared=False)
    finite = FiniteCheck()
    finite.note("image", image)
    context.check_finite(finite, vae, torch_dtype(into.dtype))
    context.components.check_unchanged(vae)
    return image
