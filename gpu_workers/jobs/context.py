"""What a job works with: this rank's components and device, its client, and its client's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

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
    """What one job works with. ``provide`` gets a block of this process for results that do not fit the client's."""

    components: Components
    device: torch.device
    is_leader: bool
    """Rank 0 alone writes outputs, encodes, and decodes small images."""
    client: ProcessIdentity
    kept: KeptTensors
    open_io: Callable[[], OpenIo]
    provide: Callable[[int], HostArena]

    def reader(self, io: OpenIo) -> ArgumentReader:
        return ArgumentReader(io, self.device, self.kept, self.client)

    def check_finite(self, finite: FiniteCheck, component: Component, *into: torch.dtype) -> None:
        """Refuse results that are not finite.

        Raises:
            StaleSource: because the component's weights were changed.
            NotFinite: they were not.
        """
        fault = finite.fault(component, *into)
        if fault is not None:
            self.components.check_unchanged(component)
            raise fault


class PhaseClock(Clock):
    """Times the phases of a job, with the work that they leave to the GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def end_phase(self, phase: str, *, waits: bool = True) -> None:
        """Note the milliseconds since the last phase. Without ``waits`` the GPU's work counts to a later one."""
        if waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.mark(phase)
