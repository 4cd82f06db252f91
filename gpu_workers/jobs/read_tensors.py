"""The ``ReadTensors`` job: copy tensors to the client, and free held ones that it has released."""

from __future__ import annotations

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import ReadTensors


def run(job: ReadTensors, context: JobContext) -> Finished:
    """Rank 0 writes the tensors; every rank frees the released ones."""
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        found = {name: _find(job, context, name) for name in job.places}
        io = context.open_io() if found else None
    for name, tensor in found.items():
        whole = context.held.shares.whole(tensor, Ranks.all())  # all ranks gather those of which they have shares
        with raise_on_all_ranks():
            if context.is_leader and io is not None:
                io.write(name, job.places[name], whole)
    context.held.release(context.client, job.released)
    clock.end_phase("outputs")
    return Finished(clock.marks_ms)


def _find(job: ReadTensors, context: JobContext, name: str) -> torch.Tensor:
    if job.component_id is None:
        return context.held.find(context.client, name, "held tensor")
    component = context.components.get(job.component_id, "module")
    found = component.tensors.get(name)
    if found is None:
        raise BadRequest(f"tensor {name}: component {job.component_id} has none of this name")
    return found
