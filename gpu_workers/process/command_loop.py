"""The command loop of a rank: receive a command from the daemon, run it, send a report, until ``Shutdown``."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections import deque
from typing import Any

import zmq

from xditd.gpu_workers.process.executor import Executor
from xditd.ipc import limits
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import command_decoder, encode
from xditd.ipc.errors import Cancelled, Internal, OtherRankFailed
from xditd.ipc.name_lists import for_message, in_log_lines
from xditd.ipc.worker_messages import (
    AnyCommand,
    AnyReport,
    BuildModel,
    CancelRun,
    ComponentCopied,
    CopyComponent,
    DigestIo,
    Done,
    FilesDigested,
    ForgetClient,
    FramesReached,
    IoDigested,
    MemoryCounted,
    ModelBuilt,
    Plug,
    Plugged,
    Prepare,
    Prepared,
    RankFailed,
    RankReady,
    Run,
    Shutdown,
    StepReached,
    Unmap,
    WarmUpModel,
)

logger = logging.getLogger(__name__)


class DaemonChannel:
    """The rank's socket to the daemon: receives commands, sends reports. For one thread."""

    def __init__(self, runtime_dir: RuntimeDir) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1_000)  # time to send the last report, if the daemon still runs
        self._socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_COMMAND_BYTES)
        self._socket.connect(endpoint(runtime_dir.worker_socket))
        self._waiting: deque[AnyCommand] = deque()

    def receive(self, wait_s: float | None = None) -> AnyCommand | None:
        """Wait for the next command, ``None`` after ``wait_s`` without one.

        Without ``wait_s`` there is no deadline: if the daemon dies, the kernel kills this process.
        """
        if self._waiting:
            return self._waiting.popleft()
        if wait_s is not None and not self._socket.poll(round(wait_s * 1e3)):
            return None
        return command_decoder.decode(self._socket.recv())

    def is_cancelled(self, op_number: int, wait_s: float = 0.0) -> bool:
        """Return whether the running command was cancelled. Wait up to ``wait_s`` for a next command.

        Other commands are queued for :meth:`receive`.
        """
        if wait_s:
            self._socket.poll(round(wait_s * 1e3))
        while self._socket.poll(0):
            self._waiting.append(command_decoder.decode(self._socket.recv()))
        return any(isinstance(c, CancelRun) and c.target_op_number == op_number for c in self._waiting)

    def send(self, report: AnyReport) -> None:
        self._socket.send(encode(report))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class CommandLoop:
    """Passes the daemon's commands to an executor, and sends its results to the daemon as reports.

    ``group_token`` proves that reports belong to this group.
    """

    def __init__(self, channel: DaemonChannel, executor: Executor, group_token: str) -> None:
        self._channel = channel
        self._executor = executor
        self._token = group_token
        self._rank = executor.facts.rank

    def serve(self) -> None:
        """Report that the rank is ready, then run commands until ``Shutdown``.

        After an error that may leave this rank in another state than the others, report it as fatal and end the
        process: the leader then ends the group, and the daemon starts a new one.
        """
        executor = self._executor
        facts = executor.facts._asdict()
        self._channel.send(RankReady(group_token=self._token, pid=os.getpid(), **facts))
        while True:
            self._send_findings()
            command = self._channel.receive(executor.idle_wait_s)
            if command is None:
                executor.while_idle()
                continue
            if isinstance(command, Shutdown):
                break
            if isinstance(command, CancelRun):
                continue  # its job has ended already
            try:
                self._handle(command)
                executor.after_answer()
                executor.while_idle()
            except Exception as error:  # noqa: BLE001 - the outermost loop of the process
                self._report_failure(command, error)
                _clear_frames(error)
        executor.close()
        self._channel.close()

    def _handle(self, command: AnyCommand) -> None:
        executor, channel = self._executor, self._channel
        common = self._common_fields(command)
        if isinstance(command, Prepare):
            channel.send(Prepared(**common, **executor.prepare(command)._asdict()))
        elif isinstance(command, BuildModel):
            timings_ms, has_warm_up = executor.build_model(command.outline)
            channel.send(ModelBuilt(**common, timings_ms=timings_ms, tally=executor.tally(), has_warm_up=has_warm_up))
        elif isinstance(command, WarmUpModel):
            timings_ms = executor.warm_up_model(command.outline)
            channel.send(Done(**common, timings_ms=timings_ms, tally=executor.tally()))
        elif isinstance(command, Plug):
            timings_ms = executor.plug(command.component_id)
            channel.send(Plugged(**common, timings_ms=timings_ms, tally=executor.tally()))
        elif isinstance(command, CopyComponent):
            copied, timings_ms = executor.copy_component(command.component_id)
            channel.send(ComponentCopied(**common, copied=copied, timings_ms=timings_ms, tally=executor.tally()))
        elif isinstance(command, Unmap):
            executor.unmap(command.component_id, keeps_copies=command.keeps_copies)
            channel.send(Done(**common, timings_ms={}, tally=executor.tally()))
        elif isinstance(command, ForgetClient):
            executor.forget(command.exporter)
            channel.send(Done(**common, timings_ms={}, tally=executor.tally()))
        elif isinstance(command, DigestIo):
            channel.send(IoDigested(**common, digest=executor.digest_io(command)))
        elif isinstance(command, Run):
            finished = executor.run(command, _JobChannel(channel, common))
            channel.send(Done(**common, **finished._asdict(), tally=executor.tally()))
        else:
            raise Internal(f"no rank handles {type(command).__name__}")

    def _common_fields(self, command: AnyCommand) -> dict[str, Any]:
        return {"group_token": self._token, "rank": self._rank, "op_number": command.op_number}

    def _send_findings(self) -> None:
        """Report what was found between commands."""
        for component_id, digests in self._executor.take_digests().items():
            self._channel.send(
                FilesDigested(group_token=self._token, rank=self._rank, component_id=component_id, digests=digests)
            )
        memory = self._executor.take_memory()
        if memory is not None:
            self._channel.send(MemoryCounted(group_token=self._token, rank=self._rank, memory=memory))

    def _report_failure(self, command: AnyCommand, raised: Exception) -> None:
        error, is_fatal = self._executor.explain(raised)
        name = type(command).__name__
        if error is not raised and isinstance(error, Internal):
            logger.error("command failed op=%s op_number=%d", name, command.op_number, exc_info=raised)
        if is_fatal:
            logger.error("rank ends op=%s error=%s", name, error.detail)
        elif not isinstance(error, (Cancelled, OtherRankFailed)):
            logger.info("refused op=%s code=%s detail=%s", name, error.code, error.detail[:500])
            if self._rank == 0:  # the others refuse the same
                for line in in_log_lines(error.names):
                    logger.info("refused, all of the names: %s", line)
        self._channel.send(
            RankFailed(
                **self._common_fields(command),
                code=error.code,
                detail=error.detail[: limits.MAX_TEXT_CHARS],  # the daemon refuses longer text
                is_fatal=is_fatal,
                names=for_message(error.names),
            )
        )
        if is_fatal:
            self._channel.close()
            sys.exit(1)


def _clear_frames(error: BaseException | None) -> None:
    """Clear the frames of an error and of those that it followed: they view lent memory, which is unmapped next.

    Without this they live until the garbage collector runs if one of them names the error itself.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _JobChannel:
    """See :class:`~xditd.gpu_workers.process.executor.JobChannel`."""

    def __init__(self, channel: DaemonChannel, common: dict[str, Any]) -> None:
        self._channel = channel
        self._common_fields = common

    def is_cancelled(self, wait_s: float = 0.0) -> bool:
        return self._channel.is_cancelled(self._common_fields["op_number"], wait_s)

    def report_step(self, step: int, total_steps: int, elapsed_s: float) -> None:
        self._channel.send(StepReached(**self._common_fields, step=step, total_steps=total_steps, elapsed_s=elapsed_s))

    def report_frames(self, frames: int, total_frames: int, elapsed_s: float) -> None:
        self._channel.send(
            FramesReached(**self._common_fields, frames=frames, total_frames=total_frames, elapsed_s=elapsed_s)
        )
