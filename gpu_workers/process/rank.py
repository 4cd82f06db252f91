"""One rank: starts xDiT, then does what the daemon says, one command after the other, until it is told to stop."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from xditd.gpu_workers.process import start_faults, xfuser_start
from xditd.gpu_workers.process.channel import DaemonChannel
from xditd.gpu_workers.process.options import Options
from xditd.gpu_workers.process.parents import die_with_parent
from xditd.ipc import limits
from xditd.ipc.errors import (
    Cancelled,
    Internal,
    OtherRankFailed,
    OutOfMemory,
    RequestError,
    WorkersLost,
    XditdError,
)
from xditd.ipc.name_lists import for_message, in_log_lines
from xditd.ipc.network_watch import OutsideConnections
from xditd.ipc.planner import Plan, report
from xditd.ipc.processes import age_s
from xditd.ipc.status import LayoutReport
from xditd.ipc.transports.cuda_ipc import device_uuid
from xditd.ipc.worker_messages import (
    CONFIGURATION_STATUS,
    AnyCommand,
    CanaryRead,
    CancelRun,
    Done,
    FilesDigested,
    ForgetClient,
    Keep,
    Kept,
    Plug,
    Plugged,
    Prepare,
    Prepared,
    RankFailed,
    RankReady,
    RankTally,
    ReadCanary,
    Run,
    Shutdown,
    StepReached,
    Unmap,
)

if TYPE_CHECKING:
    from xditd.gpu_workers.jobs.runner import Finished
    from xditd.gpu_workers.parallel.layouts import ParallelLayout

logger = logging.getLogger(__name__)

MEASURE_EVERY_S = 1.0

SWEEP_EVERY_S = 0.5
"""How long an idle rank keeps an I/O block mapped that its client has closed, at most."""


def main(
    options: Options, rank: int, plan: Plan, device: str, complain: Connection, leader_pid: int, store_path: str
) -> None:
    """Run one rank to its end. ``complain`` takes the reason when it cannot start.

    The ranks find each other through ``store_path``, an empty file of the leader's.
    """
    die_with_parent(leader_pid)
    logging.basicConfig(
        level=options.log_level.upper(), format=f"%(levelname)s rank{rank} %(name)s: %(message)s", force=True
    )
    logger.info("rank process runs rank=%d python_and_torch_s=%.2f", rank, age_s())
    outside = OutsideConnections.install()
    _quiet_libraries()
    where = torch.device(device)
    # On a GPU the host only copies small tensors, and waking sixteen threads for that was seen to take 10 ms.
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // plan.degrees.world_size) if where.type == "cpu" else 1)
    try:
        layout = xfuser_start.start(
            rank,
            plan.degrees.world_size,
            store_path,
            where,
            plan.degrees,
            options.attention_backend,
            options.kernels,
            options.precision,
        )
        served = Rank(options, layout, report(plan, options.layout), outside)
    except Exception as error:
        if not isinstance(error, RequestError):
            logger.exception("rank cannot start rank=%d", rank)
        why, is_final = start_faults.explain(error)
        complain.send_bytes(why.encode()[: start_faults.MAX_DETAIL_BYTES])
        sys.exit(CONFIGURATION_STATUS if is_final else 1)
    served.serve()


def _quiet_libraries() -> None:
    """Keep warnings about things that are never used here out of the operator's log."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors without torchvision
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that xfuser calls


class Rank:
    """A started rank and everything it holds."""

    def __init__(
        self, options: Options, layout: ParallelLayout, layout_report: LayoutReport, outside: OutsideConnections
    ) -> None:
        # Imported here: both import xfuser's dependants, which the start has to come before.
        from xditd.gpu_workers.jobs.job_io import JobIo
        from xditd.gpu_workers.jobs.runner import JobRunner
        from xditd.gpu_workers.models.components import Components
        from xditd.gpu_workers.parallel.fellows import gather_uuids

        self._uuid = device_uuid(layout.device.index) if layout.device.type == "cuda" else ""
        self._layout = layout
        self._layout_report = layout_report
        self._token = options.group_token
        self._outside = outside
        self._components = Components(layout, self._uuid, gather_uuids(self._uuid, layout.world_size))
        self._io = JobIo(layout.device)
        self._jobs = JobRunner(self._components, layout.rank, layout.device)
        self._channel = DaemonChannel(options.runtime_dir)
        self._memory_bytes = 0
        self._measured_at = -MEASURE_EVERY_S

    def serve(self) -> None:
        """Say that the rank is ready, then answer commands until ``Shutdown``.

        A fault that may leave this rank out of step with the others is reported as fatal and ends the process; the
        leader then ends the group, and the daemon builds a new one.
        """
        self._measure_memory()
        self._announce()
        while True:
            self._tell_digests()
            command = self._channel.receive(
                SWEEP_EVERY_S if len(self._io) or self._components.files.has_unreported else None
            )
            self._io.sweep()
            if command is None:
                continue
            if isinstance(command, Shutdown):
                break
            if isinstance(command, CancelRun):
                continue  # its job has ended already
            try:
                self._answer(command)
                self._measure_memory()
            except XditdError as error:
                # Requests are refused on all ranks alike before the first collective, cancels are agreed, and what
                # differs between ranks passes fellows.together. Only a defect of ours can leave the ranks apart.
                self._fail(command, error, is_fatal=isinstance(error, Internal))
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                self._fail(command, _out_of_memory(error), is_fatal=self._layout.world_size > 1)
            except Exception as error:
                if _is_want_of_host_memory(error):
                    self._fail(command, _out_of_memory(error), is_fatal=self._layout.world_size > 1)
                    continue
                if _is_loss_of_a_fellow(error):
                    # A killed process closes its connections before its GPU is tidied up and the leader hears of its
                    # end, so that those who wait for it in a collective are often the first to know.
                    self._fail(command, WorkersLost(f"another rank is gone: {error}".split("\n")[0]), is_fatal=True)
                logger.exception("command failed op=%s op_number=%d", type(command).__name__, command.op_number)
                self._fail(
                    command, Internal(f"rank {self._layout.rank}: {type(error).__name__}: {error}"), is_fatal=True
                )
        self._components.close()
        self._io.close()
        self._channel.close()
        xfuser_start.stop()

    def _answer(self, command: AnyCommand) -> None:
        common: dict[str, Any] = {"group_token": self._token, "rank": self._layout.rank, "op_number": command.op_number}
        if isinstance(command, Prepare):
            component = self._components.prepare(
                command.component_id, command.manifest, command.exporter, command.digests
            )
            self._channel.send(
                Prepared(
                    **common,
                    family=component.plan.family.name,
                    copied=component.copied,
                    is_skeleton_reused=component.plan.is_reused,
                    timings_ms=component.timings_ms,
                )
            )
        elif isinstance(command, Plug):
            component = self._components.plug(command.component_id)
            self._channel.send(Plugged(**common, timings_ms=component.timings_ms, tally=self._tally()))
        elif isinstance(command, Keep):
            copied, timings_ms = self._components.keep(command.component_id)
            self._channel.send(Kept(**common, copied=copied, timings_ms=timings_ms, tally=self._tally()))
        elif isinstance(command, Unmap):
            self._components.unmap(command.component_id)
            self._channel.send(Done(**common, timings_ms={}, tally=self._tally()))
        elif isinstance(command, ForgetClient):
            self._io.forget(command.exporter)
            self._jobs.forget(command.exporter)
            self._channel.send(Done(**common, timings_ms={}, tally=self._tally()))
        elif isinstance(command, ReadCanary):
            digest = self._io.open(command.io, command.exporter).digest(command.offset_bytes, command.length_bytes)
            self._channel.send(CanaryRead(**common, digest=digest))
        elif isinstance(command, Run):
            timings_ms, reused_steps = self._run(command)
            self._channel.send(Done(**common, timings_ms=timings_ms, tally=self._tally(), reused_steps=reused_steps))
        else:
            raise Internal(f"no rank handles {type(command).__name__}")

    def _run(self, command: Run) -> Finished:
        from xditd.gpu_workers.jobs.progress import Progress

        def tell(step: int, total_steps: int, elapsed_s: float) -> None:
            self._channel.send(
                StepReached(
                    group_token=self._token,
                    rank=self._layout.rank,
                    op_number=command.op_number,
                    step=step,
                    total_steps=total_steps,
                    elapsed_s=elapsed_s,
                )
            )

        progress = Progress(
            self._layout.rank == 0,
            self._layout.device,
            lambda: self._channel.is_cancelled(command.op_number),
            tell,
        )
        return self._jobs.run(
            command.job, lambda: self._io.open(command.job.io, command.exporter), progress, command.exporter
        )

    def _tell_digests(self) -> None:
        """Tell the daemon what files hold, for the ranks of a rebuilt group to compare with."""
        for component_id, digests in self._components.files.take_digests().items():
            self._channel.send(
                FilesDigested(
                    group_token=self._token, rank=self._layout.rank, component_id=component_id, digests=digests
                )
            )

    def _fail(self, command: AnyCommand, error: XditdError, *, is_fatal: bool) -> None:
        if is_fatal:
            logger.error("rank ends op=%s error=%s", type(command).__name__, error.detail)
        elif not isinstance(error, (Cancelled, OtherRankFailed)):
            logger.info("refused op=%s code=%s detail=%s", type(command).__name__, error.code, error.detail[:500])
            if self._layout.rank == 0:  # the others refuse the same
                for line in in_log_lines(error.names):
                    logger.info("refused, all of the names: %s", line)
        self._channel.send(
            RankFailed(
                group_token=self._token,
                rank=self._layout.rank,
                op_number=command.op_number,
                code=error.code,
                detail=error.detail[: limits.MAX_TEXT_CHARS],  # a longer one would be refused, and nobody answered
                is_fatal=is_fatal,
                names=for_message(error.names),
            )
        )
        if is_fatal:
            self._channel.close()
            sys.exit(1)

    def _announce(self) -> None:
        layout = self._layout
        is_cuda = layout.device.type == "cuda"
        self._channel.send(
            RankReady(
                group_token=self._token,
                rank=layout.rank,
                world_size=layout.world_size,
                pid=os.getpid(),
                device_kind=layout.device.type,
                device=torch.cuda.get_device_name(layout.device) if is_cuda else "cpu",
                device_uuid=self._uuid,
                parallel=layout.degrees.named(),
                layout=self._layout_report,
                attention_backend=layout.fused_attention or layout.attention_backend,
                precision=layout.precision,
            )
        )

    def _measure_memory(self) -> None:
        """Look at the GPU's memory in use, for the next tally: after an answer, so that no client waits for it."""
        now = time.monotonic()
        if self._layout.device.type == "cuda" and now - self._measured_at >= MEASURE_EVERY_S:
            free, total = torch.cuda.mem_get_info(self._layout.device)
            self._memory_bytes, self._measured_at = total - free, now

    def _tally(self) -> RankTally:
        return RankTally(
            loaded=len(self._components),
            skeletons_built=self._components.skeletons.built,
            skeletons_reused=self._components.skeletons.reused,
            plugs=self._components.plugs,
            outside_connections=len(self._outside.attempts),
            memory_bytes=self._memory_bytes,
            fused_checks=self._components.skeletons.take_checks(),
        )


def _out_of_memory(error: BaseException) -> OutOfMemory:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return OutOfMemory(
        f"no room on the worker's device: {first_line}; use a smaller size or batch, or free memory there"
    )


def _is_want_of_host_memory(error: Exception) -> bool:
    """torch's allocator for CPUs has no error class of its own.

    Source: c10/core/impl/alloc_cpu.cpp, "DefaultCPUAllocator: can't allocate memory".
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _is_loss_of_a_fellow(error: Exception) -> bool:
    """Say whether a collective failed because another process ended; gloo has no error class for that.

    Source: gloo/transport/tcp/pair.cc, "Connection closed by peer"; a reset is the same, with data under way.
    """
    if isinstance(error, torch.distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(
        mark in str(error) for mark in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )
