"""``Encode``: latents from images, on rank 0."""

from __future__ import annotations

from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.workplace import Laps, Workplace
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.fellows import together, with_every_core
from xditd.ipc.requests import Encode
from xditd.ipc.transports.layout import torch_dtype


def run(job: Encode, place: Workplace) -> Finished:
    """Encode an image, in the order of channels in which it comes, and write the latents."""
    clock = Laps(place.device)
    with together():
        vae = place.components.get(job.vae_id, "vae")
        clock.lap("plug")
        io = place.open_io()
        image = io.read("image", job.image, place.device)
        if image.ndim == 4 and image.shape[-1] == place.operations(vae).facts(vae.plan.config).image_channels:
            image = image.movedim(-1, 1)  # computed in the layout in which it came
        if place.is_leader:
            clock.lap("inputs")
            with with_every_core(place.device):
                latents = place.operations(vae).encode(vae.plan.skeleton, image)
            finite = FiniteCheck()
            finite.note("latents", latents)
            place.check_finite(finite, vae, torch_dtype(job.out.dtype))
            place.components.check_unchanged(vae)
            io.write("out", job.out, latents)
            clock.lap("encode")
    return Finished(clock.marks_ms)
