"""The context of a job: components, device, client, and the client's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.kept import KeptTensors
from xditd.gpu_workers.jobs.reading import ArgumentReader
from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.components import Component, Components
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.ipc.processes import ProcessIdentity
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

    def reader(self, io: OpenIo) -> ArgumentReader:
        return ArgumentReader(io, self.device, self.kept, self.client)

    def check_finite(self, finite: FiniteCheck, component: Component, *into: torch.dtype) -> None:
        """Check that results are finite.

        Raises:
            StaleSource: they are not, and the component's weights have changed.
            NotFinite: they are not, with unchanged weights.
        """
        fault = finite.fault(component, *into)
        if fault is not None:
            self.components.check_unchanged(component)
            raise fault


class PhaseClock(Clock):
    """Times the phases of a job, including their work on the GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def end_phase(self, phase: str, *, waits: bool = True) -> None:
        """Store the milliseconds since the last phase. Without ``waits`` pending GPU work counts to a later phase."""
        if waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.mark(phase)
