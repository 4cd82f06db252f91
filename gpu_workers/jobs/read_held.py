"""The ``ReadHeld`` job: copy held tensors to the client, and free those that it has released."""

from __future__ import annotations

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.ipc.requests import ReadHeld


def run(job: ReadHeld, context: JobContext) -> Finished:
    """Rank 0 writes the tensors; every rank frees the released ones."""
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        if job.places:
            io = context.open_io()
            for held_id, place in job.places.items():
                tensor = context.held.find(context.client, held_id, "held tensor")
                if context.is_leader:
                    io.write(held_id, place, tensor)
    context.held.release(context.client, job.released)
    clock.end_phase("outputs")
    return Finished(clock.marks_ms)
