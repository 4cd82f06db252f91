"""The executor that runs torch: components, I/O blocks and jobs on one device."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Final

import torch

from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.job_io import JobIo
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.jobs.runner import JobRunner
from xditd.gpu_workers.models.components import Components
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.lora_match import LoraMatch
from xditd.gpu_workers.models.path_choice import compiles_blocks
from xditd.gpu_workers.models.tokenizer_match import TokenizerMatch
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_errors import is_host_out_of_memory, is_peer_rank_failure, out_of_memory
from xditd.gpu_workers.parallel.rank_sync import gather_uuids
from xditd.gpu_workers.process.executor import JobChannel, PreparedFacts, RankFacts, TimingsMs
from xditd.gpu_workers.process.idle_memory import IdleMemory, count_parts
from xditd.gpu_workers.process.late_imports import LateImports
from xditd.ipc import limits
from xditd.ipc.errors import Internal, WorkersLost, XditdError
from xditd.ipc.network_watch import OutsideConnections
from xditd.ipc.outlines import Outline
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.status import ForwardPath, LayoutReport, LoraCounts, MemoryParts
from xditd.ipc.tensors import CopiedBytes, FileDigest
from xditd.ipc.transports.cuda_ipc import device_uuid
from xditd.ipc.worker_messages import DigestIo, Prepare, RankTally, Run

logger = logging.getLogger(__name__)

MEASURE_EVERY_S: Final = 1.0

UNMAP_CLOSED_EVERY_S: Final = 0.5
"""An idle rank unmaps an I/O block at most this long after its client has closed it."""


class TorchExecutor:
    """See :class:`~xditd.gpu_workers.process.executor.Executor`."""

    def __init__(
        self, layout: ParallelLayout, layout_report: LayoutReport, outside: OutsideConnections, group: str
    ) -> None:
        is_cuda = layout.device.type == "cuda"
        uuid = device_uuid(layout.device.index) if is_cuda else ""
        self.facts = RankFacts(
            rank=layout.rank,
            world_size=layout.world_size,
            device_kind=layout.device.type,
            device=torch.cuda.get_device_name(layout.device) if is_cuda else "cpu",
            device_uuid=uuid,
            parallel=layout.degrees.named(),
            layout=layout_report,
            attention_backend=layout.fused_attention or layout.attention_backend,
            precision=layout.precision,
        )
        self._layout = layout
        self._outside = outside
        self._components = Components(layout, uuid, gather_uuids(uuid, layout.world_size))
        self._io = JobIo(layout.device)
        self._jobs = JobRunner(self._components, layout.rank, layout.device, group)
        components = self._components
        self._imports = LateImports(
            lambda: components.class_models.graphs, compiles=compiles_blocks(layout.acceleration, layout.device)
        )
        self._memory = IdleMemory(
            layout.device, partial(count_parts, layout.device, uuid, components), lambda: components.models_dropped
        )
        self._memory_bytes = 0
        self._measured_at = -MEASURE_EVERY_S
        self._measure_memory()

    @property
    def idle_wait_s(self) -> float | None:
        has_periodic_work = len(self._io) or self._components.files.has_unreported
        waits_s = (UNMAP_CLOSED_EVERY_S if has_periodic_work else None, self._imports.wait_s, self._memory.wait_s)
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def while_idle(self) -> None:
        self._io.unmap_closed()
        self._imports.run_next()
        self._memory.run_due()

    def take_digests(self) -> Mapping[str, tuple[FileDigest, ...]]:
        return self._components.files.take_digests()

    def take_memory(self) -> MemoryParts | None:
        return self._memory.take()

    def prepare(self, command: Prepare) -> PreparedFacts:
        self._imports.finish_for_lend()
        component = self._components.prepare(
            command.component_id, command.manifest, command.exporter, command.digests, command.changed
        )
        match = component.match
        heads = match.family.heads(match.config)
        if heads and self.facts.rank == 0 and not isinstance(match, (LoraMatch, TokenizerMatch)):
            logger.info(
                "layout of a component component_id=%s family=%s heads=%d layout=%s",
                command.component_id, match.family.name, heads, match.model.layout.degrees,
            )  # fmt: skip
        return PreparedFacts(component.facts, component.copied, match.is_reused, component.timings_ms)

    def build_model(self, outline: Outline) -> tuple[TimingsMs, bool]:
        began_s = time.perf_counter()
        self._imports.finish_for_lend()
        has_warm_up = self._components.build_ahead(outline)
        return {"build": (time.perf_counter() - began_s) * 1e3}, has_warm_up

    def warm_up_model(self, outline: Outline) -> TimingsMs:
        began_s = time.perf_counter()
        self._components.warm_up(outline)
        return {"warm_up": (time.perf_counter() - began_s) * 1e3}

    def plug(self, component_id: str) -> TimingsMs:
        return self._components.plug(component_id).timings_ms

    def copy_component(self, component_id: str) -> tuple[CopiedBytes, TimingsMs]:
        return self._components.copy_component(component_id)

    def unmap(self, component_id: str, *, keeps_copies: bool = False) -> None:
        self._components.unmap(component_id, keeps_copies=keeps_copies)

    def forget(self, client: ProcessIdentity) -> None:
        self._io.forget(client)
        self._jobs.forget(client)

    def digest_io(self, command: DigestIo) -> bytes:
        return self._io.open(command.io, command.exporter).digest(command.offset_bytes, command.length_bytes)

    def run(self, command: Run, job_channel: JobChannel) -> Finished:
        progress = Progress(
            self.facts.rank == 0,
            self._layout.device,
            job_channel.is_cancelled,
            job_channel.report_step,
            job_channel.report_frames,
        )
        job, exporter = command.job, command.exporter
        try:
            return self._jobs.run(
                job,
                lambda: self._io.open(job.io, exporter),
                lambda size_bytes: self._io.provide(exporter, size_bytes),
                progress,
                exporter,
            )
        except BaseException:
            # Before the next command: other ranks may have failed elsewhere in the job, and would decide other runs.
            for paths in self._paths():
                paths.drop_runs()
            raise

    def tally(self) -> RankTally:
        models, class_models = self._components.models, self._components.class_models
        return RankTally(
            loaded=len(self._components),
            models_built=models.built + class_models.built,
            models_reused=models.reused + class_models.reused,
            plugs=self._components.plugs,
            outside_connections=len(self._outside.attempts),
            memory_bytes=self._memory_bytes,
            fused_checks=models.take_checks(),
            split_checks=class_models.take_split_checks(),
            forward_paths=self._take_forward_paths(),
            packed_products=self._components.packed.counts.report() if self.facts.rank == 0 else (),
            loras=self._components.lora_counts() if self.facts.rank == 0 else LoraCounts(),
        )

    def _paths(self) -> list[ForwardPaths]:
        return [*self._components.models.paths, *self._components.class_models.paths]

    def _take_forward_paths(self) -> tuple[ForwardPath, ...]:
        found = [path for paths in self._paths() for path in paths.take_reports()]
        return tuple(found[-limits.MAX_FORWARD_PATHS :])

    def after_answer(self) -> None:
        """Choose the paths of the forwards that have run, and measure the GPU's memory in use for the next tally."""
        self._imports.note_command()
        self._memory.note_command()
        try:
            for paths in self._paths():
                paths.decide()
        except XditdError as error:  # the command has been answered: no client gets this
            raise Internal(f"rank {self.facts.rank}: a forward could not be compared: {error.detail}") from error
        self._measure_memory()

    def _measure_memory(self) -> None:
        now = time.monotonic()
        if self._layout.device.type == "cuda" and now - self._measured_at >= MEASURE_EVERY_S:
            free, total = torch.cuda.mem_get_info(self._layout.device)
            self._memory_bytes, self._measured_at = total - free, now

    def explain(self, error: Exception) -> tuple[XditdError, bool]:
        if isinstance(error, XditdError):
            # All ranks refuse a request alike before the first collective, stop at the same step, and share other
            # errors by raise_on_all_ranks. So only a defect of ours leaves ranks in different states.
            return error, isinstance(error, Internal)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return out_of_memory(error), self._layout.world_size > 1
        if is_host_out_of_memory(error):
            return out_of_memory(error), self._layout.world_size > 1
        if is_peer_rank_failure(error):
            # The kernel closes a killed process's connections before the leader sees its exit, so the ranks that wait
            # for it in a collective often see the failure first.
            return WorkersLost(f"another rank is gone: {error}".split("\n")[0]), True
        return Internal(f"rank {self.facts.rank}: {type(error).__name__}: {error}"), True

    def close(self) -> None:
        for paths in self._paths():
            paths.close()
        self._components.class_models.close()
        self._components.close()
        self._jobs.close()
        self._io.close()
