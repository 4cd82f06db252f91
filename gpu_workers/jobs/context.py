"""The context of a job: components, device, client, and the client's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.kept import KeptTensors
from xditd.gpu_workers.jobs.reading import ArgumentReader
from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.components import Components
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.client_blocks import ClientBlocks, OpenClientBlock
from xditd.ipc.arguments import InIo, tensors
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call
from xditd.ipc.transports.host_shm import HostArena


@dataclass(frozen=True, eq=False)
class JobContext:
    """The context of one job. ``provide`` makes a block of this process for results that do not fit the client's."""

    components: Components
    device: torch.device
    is_leader: bool
    """Rank 0 alone writes outputs, encodes, and decodes small images."""
    client: ProcessIdentity
    kept: KeptTensors
    held: HeldTensors
    open_io: Callable[[], OpenIo]
    provide: Callable[[int], HostArena]
    client_blocks: ClientBlocks

    def reader(self, io: OpenIo, device_io: OpenClientBlock | None = None) -> ArgumentReader:
        return ArgumentReader(io, self.device, self.kept, self.client, device_io=device_io)

    def open_device_io(self, job: Call) -> OpenClientBlock | None:
        """Return the block of device memory of a call, if it has one, and unmap those that the client drops.

        All ranks call this together, outside of :func:`raise_on_all_ranks`.

        Raises:
            ForeignGpu, StaleSource, BadRequest, OtherRankFailed, OutOfMemory: see :meth:`ClientBlocks.open`.
        """
        self.client_blocks.unmap(self.client, job.dropped_device_io)
        if job.device_io is None:
            return None
        trees = [tree for part in job.parts for tree in (part.arguments, *(each.arguments for each in part.controls))]
        leaves = (leaf for tree in trees for _, leaf in tensors(tree))
        ends = [
            leaf.offset_bytes + leaf.place.size_bytes for leaf in leaves if isinstance(leaf, InIo) and leaf.in_device_io
        ]
        return self.client_blocks.open(job.device_io, self.client, max(ends, default=0))

    def check_finite(
        self, finite: FiniteCheck, component: Component, *into: torch.dtype, loras: Sequence[LoraUse] = ()
    ) -> None:
        """Check that results are finite. ``loras`` are those of the job.

        Raises:
            StaleSource: they are not, and the component's weights or factors of its LoRAs have changed.
            NotFinite: they are not, with unchanged weights; names the LoRAs with their strengths, too.
        """
        fault = finite.fault(component, *into, loras=self.components.titles_of(loras))
        if fault is not None:
            self.components.check_unchanged(component, loras)
            raise fault


class PhaseClock(Clock):
    """Times the phases of a job, including their work on the GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        # The thread sleeps until the GPU is there. While it spins, it takes a processor that others need, and on a busy
        # host it has used up its share when the GPU is done.
        self._reached = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def end_phase(self, phase: str, *, waits: bool = True) -> None:
        """Store the milliseconds since the last phase. Without ``waits`` pending GPU work counts to a later phase."""
        if waits and self._reached is not None:
            self._reached.record(torch.cuda.current_stream(self._device))
            self._reached.synchronize()
            torch.cuda.synchronize(self._device)  # other streams
        self.mark(phase)
