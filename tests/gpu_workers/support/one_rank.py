"""For tests: one rank in this process that runs whole jobs from messages, with a client's I/O blocks.

Import this once the group is started: until then there is no xfuser to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.io_places import IoPlaces
from xditd.client.lending import Offer, describe
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.job_io import JobIo
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.jobs.runner import JobRunner
from xditd.gpu_workers.models.components import Components
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.arguments import InIo
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.requests import InferenceRequest
from xditd.ipc.tensors import HostShmBlock, IoTensor

CPU = torch.device("cpu")


class Room:
    """The I/O block of one job, as its client has it: inputs first, then places for outputs."""

    def __init__(self, pool: IoPool) -> None:
        self._pool = pool
        self._layout = IoPlaces()
        self._inputs: list[tuple[IoTensor, torch.Tensor]] = []
        self._block: IoBlock | None = None

    def input(self, tensor: torch.Tensor) -> IoTensor:
        place = self._layout.add_input(tensor)
        self._inputs.append((place, tensor))
        return place

    def argument(self, tensor: torch.Tensor, kept_id: str | None = None) -> InIo:
        place = self.input(tensor)
        return InIo(offset_bytes=place.offset_bytes, dtype=place.dtype, shape=place.shape, kept_id=kept_id)

    def output(self, *shape: int, dtype: torch.dtype = torch.float32) -> IoTensor:
        return self._layout.add_output(dtype, shape)

    def results(self, size_bytes: int) -> dict[str, int]:
        """Room for what a call gives: these arguments of ``Call``."""
        return {"out_offset_bytes": self._layout.add_room(size_bytes), "out_size_bytes": size_bytes}

    def block(self) -> HostShmBlock:
        """Write the inputs. Nothing is added from here on."""
        self._block = self._pool.borrow(self._layout.size_bytes)
        for place, tensor in self._inputs:
            self._block.write(place, tensor)
        return self._block.describe()

    def read(self, place: IoTensor) -> torch.Tensor:
        assert self._block is not None
        return self._block.read(place, CPU)


class OneRank:
    """Components, kept tensors and I/O blocks as a worker has them; this process is the client, too."""

    def __init__(self, layout: ParallelLayout) -> None:
        self.client = identify(os.getpid())
        self.components = Components(layout, "", ("",))
        self.io = JobIo(CPU)
        self.runner = JobRunner(self.components, 0, CPU)
        self.steps: list[tuple[int, int]] = []
        """The reported steps of the latest job: steps done, and steps in all."""
        self.frames: list[tuple[int, int]] = []
        """The same of decoded frames of a video."""
        self._pool = IoPool()
        self._rooms: list[Room] = []
        self._offers: list[Offer] = []

    def lend(self, component_id: str, source: Path | Mapping[str, torch.Tensor]) -> None:
        """Lend a file, or tensors from an arena."""
        offer = describe(source)
        self._offers.append(offer)
        self.components.prepare(component_id, offer.manifest, self.client)
        self.components.plug(component_id)

    def room(self) -> Room:
        """Make room for a job's tensors; it stays as long as this rank."""
        self._rooms.append(Room(self._pool))
        return self._rooms[-1]

    def run(
        self,
        job: InferenceRequest,
        *,
        client: ProcessIdentity | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
        on_step: Callable[[int, int], None] = lambda *_: None,
    ) -> Finished:
        """Run a job, for this process or for another client whose I/O block is this process' nevertheless."""
        self.steps.clear()
        self.frames.clear()

        def tell(done: int, total: int, _: float) -> None:
            self.steps.append((done, total))
            on_step(done, total)

        asks_for = client or self.client
        return self.runner.run(
            job,
            lambda: self.io.open(job.io, self.client),
            lambda size_bytes: self.io.provide(asks_for, size_bytes),
            Progress(True, CPU, is_cancelled, tell, lambda done, total, _: self.frames.append((done, total))),
            asks_for,
        )

    def forget(self, client: ProcessIdentity) -> None:
        """Free what a client that is gone has left, as a worker does."""
        self.runner.forget(client)
        self.io.forget(client)

    def close(self) -> None:
        self.components.close()
        self.io.close()
        self._pool.close()
        for offer in self._offers:
            offer.close()
