"""Run each kind of job on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from xditd.gpu_workers.jobs import (
    call,
    call_module,
    decode,
    encode,
    encode_prompt,
    encode_text,
    generate,
    read_tensors,
)
from xditd.gpu_workers.jobs.context import JobContext
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.kept import KeptTensors
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.models.components import Components
from xditd.gpu_workers.parallel.client_blocks import ClientBlocks
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call, Decode, Encode, EncodePrompt, Generate, InferenceRequest, ReadTensors
from xditd.ipc.transports.host_shm import HostArena


class JobRunner:
    """Runs jobs on this rank's components. ``group`` is a text that no earlier group of workers had."""

    def __init__(self, components: Components, rank: int, device: torch.device, group: str = "") -> None:
        self._components = components
        self._is_leader = rank == 0
        self._device = device
        self._kept = KeptTensors()
        self._held = HeldTensors(group)
        self._client_blocks = ClientBlocks(components.gpu_copies)

    def forget(self, client: ProcessIdentity) -> None:
        """Free the kept and held tensors of a client that has exited, and unmap its device memory."""
        self._kept.forget(client)
        self._held.forget(client)
        self._client_blocks.forget(client)

    def close(self) -> None:
        """Unmap the device memory of all clients."""
        self._client_blocks.close()

    def run(
        self,
        job: InferenceRequest,
        open_io: Callable[[], OpenIo],
        provide: Callable[[int], HostArena],
        progress: Progress,
        client: ProcessIdentity,
    ) -> Finished:
        """Run a client's job.

        Raises:
            RequestError: on every rank, before any step.
            OtherRankFailed, OutOfMemory, PeerError: inputs could not be read; on every rank.
            Cancelled: on every rank at the same step or chunk of frames.
            NotFinite: a result is not finite; on rank 0 or on every rank, after the last collective.
        """
        started = time.perf_counter()
        context = JobContext(
            self._components,
            self._device,
            self._is_leader,
            client,
            self._kept,
            self._held,
            open_io,
            provide,
            self._client_blocks,
        )
        if isinstance(job, Call):
            with self._held.undone_on_error(client):
                is_module = self._components.has_module(job.component_id)
                finished = call_module.run(job, context) if is_module else call.run(job, context)
        elif isinstance(job, ReadTensors):
            finished = read_tensors.run(job, context)
        elif isinstance(job, Generate):
            finished = generate.run(job, context, progress)
        elif isinstance(job, Decode):
            finished = decode.run(job, context, progress)
        elif isinstance(job, Encode):
            finished = encode.run(job, context)
        elif isinstance(job, EncodePrompt):
            finished = encode_prompt.run(job, context)
        else:
            finished = encode_text.run(job, context)
        finished.timings_ms["total"] = (time.perf_counter() - started) * 1e3
        return finished
