"""The ``Decode`` job, latents to images; ``Generate`` decodes by the same functions."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Final

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc.facts import LatentScaling
from xditd.ipc.requests import Decode
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.tensor_views import torch_dtype

_IMAGE_DIMENSIONS: Final = 4
_VIDEO_DIMENSIONS: Final = 5
_FRAMES: Final = 2
"""The dimension of frames."""


def run(job: Decode, context: JobContext, progress: Progress) -> Finished:
    """Decode latents; rank 0 writes the image."""
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        vae = context.components.get(job.vae_id, "vae")
        facts = vae.vae_facts
        clock.end_phase("plug")
        io = context.open_io()
        latents = io.read("latents", job.latents, context.device)
        if latents.ndim in (_IMAGE_DIMENSIONS, _VIDEO_DIMENSIONS):  # else the VAE refuses them
            io.check("out", job.out, facts.latents.pixels_of(tuple(latents.shape), facts.image_channels))
    clock.end_phase("inputs")
    decode_into(context, progress, Decoding(vae, latents, job.scaling or facts.latents.scaling, io, job.out))
    clock.end_phase("decode")
    return Finished(clock.marks_ms)


@dataclass(frozen=True, eq=False)
class Decoding:
    """What is decoded, and ``out``, the place for it in ``io``, whose shape was checked."""

    vae: Component
    latents: torch.Tensor
    scaling: LatentScaling
    io: OpenIo
    out: IoTensor
    is_clamped: bool = False
    """To [-1, 1]."""


def decode_into(context: JobContext, progress: Progress, decoding: Decoding) -> None:
    """Decode on all ranks, or a small image on rank 0, which is faster alone; rank 0 writes and checks the result.

    The copies from a GPU are in the order of its stream, for which the caller has to wait.

    Do not call it inside ``raise_on_all_ranks``: a decode on all ranks has many collectives, and a rank that runs out
    of memory reaches none of the later ones. That rank ends, and the group with it, as in a step.

    Raises:
        BadRequest: a wrong shape, or values that are not finite; on every rank.
        Cancelled: after a chunk of a video; on every rank.
        NotFinite: on rank 0, or on every rank.
    """
    model = decoding.vae.model
    is_shared = model.operations_for("vae").shares(model, decoding.latents)
    finite = FiniteCheck()
    if is_shared:
        _write_chunks(context, progress, decoding, finite, is_shared=True)
    with raise_on_all_ranks():
        if context.is_leader:
            if not is_shared:
                with using_all_cores(context.device):
                    _write_chunks(context, progress, decoding, finite, is_shared=False)
            context.check_finite(finite, decoding.vae, torch_dtype(decoding.out.dtype))
            context.components.check_unchanged(decoding.vae)


def _write_chunks(
    context: JobContext, progress: Progress, decoding: Decoding, finite: FiniteCheck, *, is_shared: bool
) -> None:
    """Decode on this rank; the leader writes each chunk, so that memory does not grow with the length of a video."""
    model, out = decoding.vae.model, decoding.out
    total = out.shape[_FRAMES] if len(out.shape) == _VIDEO_DIMENSIONS else 1
    done = 0
    chunks = model.operations_for("vae").decode(model, decoding.latents, decoding.scaling, is_shared=is_shared)
    with closing(chunks):
        for chunk in chunks:
            is_video = chunk.ndim == _VIDEO_DIMENSIONS
            if context.is_leader:
                finite.note_part("image", chunk)
                part = chunk.clamp(-1.0, 1.0) if decoding.is_clamped else chunk
                decoding.io.write_part(out, _FRAMES if is_video else 0, done, part)
            done += chunk.shape[_FRAMES] if is_video else 1
            if total > 1:
                progress.frames(done, total, is_shared=is_shared)
