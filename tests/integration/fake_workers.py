"""A worker group without GPU and torch: real processes, the real protocol, and faults on request.

Started in place of ``python -m xditd.gpu_workers``, with the same flags. What it maps are real descriptors of the
client's process, opened through /proc as the real workers do. A job's ``seed`` names a fault from :class:`Fault`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import zmq

from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import command_decoder, encode
from xditd.ipc.degrees import parse_layout
from xditd.ipc.errors import BadCheckpoint, BadRequest, Cancelled, Internal, StaleSource, XditdError
from xditd.ipc.planner import plan, report
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import Message
from xditd.ipc.requests import Generate
from xditd.ipc.status import FusedCheck
from xditd.ipc.tensors import CopiedBytes, CudaIpcBlock, Manifest
from xditd.ipc.worker_messages import (
    CanaryRead,
    CancelRun,
    Command,
    Done,
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

REFUSED_LABEL = "refused-by-the-last-rank"
STUCK_LABEL = "cannot-be-unmapped"
DEADLY_LABEL = "deadly"
"""Labels of components with a fault of their own."""


class Fault(enum.IntEnum):
    """Seeds that make a job go wrong."""

    CRASH = 901
    """The last rank kills itself at the first step."""
    HANG = 902
    """No rank says anything any more."""
    REFUSE = 903
    """Every rank refuses, in step."""
    FATAL = 904
    """Rank 0 says that it is out of step."""
    INEXACT = 906
    """Fused kernels were compared with plain modules, and refused."""
    DEAF = 905
    """Steps go on for ever, and no cancel is heard."""


def die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


class Rank:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.plugged: set[str] = set()
        self.known: set[str] = set()
        self.plugs = 0
        self.checks: list[FusedCheck] = []
        self.socket = zmq.Context().socket(zmq.DEALER)
        self.socket.connect(endpoint(RuntimeDir(Path(options.runtime_dir)).worker_socket))

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def serve(self) -> None:
        asked = parse_layout(self.options.layout)
        planned = plan(self.options.world_size, asked)
        self.send(
            RankReady(
                group_token=self.options.group_token,
                rank=self.options.rank,
                world_size=self.options.world_size,
                pid=os.getpid(),
                device_kind="cpu",
                device="cpu",
                device_uuid="",
                parallel=planned.degrees.named(),
                layout=report(planned, asked),
                attention_backend="fake",
                precision="bf16",
            )
        )
        while True:
            command = command_decoder.decode(self.socket.recv())
            if isinstance(command, Shutdown):
                return
            if isinstance(command, CancelRun):
                continue
            try:
                self.answer(command)
            except XditdError as error:
                self.fail(command, error)

    def fail(self, command: Command, error: XditdError) -> None:
        is_fatal = isinstance(error, Internal)
        self.send(RankFailed(**self.common(command), code=error.code, detail=error.detail, is_fatal=is_fatal))

    def common(self, command: Command) -> dict[str, object]:
        return {"group_token": self.options.group_token, "rank": self.options.rank, "op_number": command.op_number}

    def answer(self, command: Command) -> None:
        common = self.common(command)
        if isinstance(command, Prepare):
            self.prepare(command)
            self.send(
                Prepared(
                    **common,
                    family="fake",
                    copied=CopiedBytes(host_to_host=100),
                    is_skeleton_reused=bool(self.plugs),
                    timings_ms={"map": 1.0 + self.options.rank},
                )
            )
        elif isinstance(command, Plug):
            self.plugged.add(command.component_id)
            self.plugs += 1
            self.send(Plugged(**common, timings_ms={"plug": 0.5}, tally=self.tally()))
        elif isinstance(command, Unmap):
            if STUCK_LABEL in self.known:
                raise BadRequest("a view is still open")
            self.plugged.discard(command.component_id)
            self.send(Done(**common, timings_ms={}, tally=self.tally()))
        elif isinstance(command, Keep):
            self.send(Kept(**common, copied=CopiedBytes(host_to_host=64), timings_ms={"copy": 1.0}, tally=self.tally()))
        elif isinstance(command, ForgetClient):
            self.send(Done(**common, timings_ms={}, tally=self.tally()))
        elif isinstance(command, ReadCanary):
            content = read(command.exporter, command.io.fd, command.offset_bytes, command.length_bytes)
            self.send(CanaryRead(**common, digest=hashlib.blake2b(content, digest_size=16).digest()))
        elif isinstance(command, Run):
            self.run(command)
            self.send(Done(**common, timings_ms={"steps": 2.0 + self.options.rank}, tally=self.tally()))

    def prepare(self, command: Prepare) -> None:
        manifest: Manifest = command.manifest
        self.known.add(manifest.label)
        is_last = self.options.rank == self.options.world_size - 1
        if manifest.label == REFUSED_LABEL and is_last:
            raise BadCheckpoint("tensor final.weight is missing")
        if manifest.label.startswith(DEADLY_LABEL) and is_last and (self.options.starts > 1 or "now" in manifest.label):
            os.kill(os.getpid(), signal.SIGKILL)
        for block in manifest.blocks:
            if not isinstance(block, CudaIpcBlock):
                read(command.exporter, block.fd, 0, 1)

    def run(self, command: Run) -> None:
        job = command.job
        if not isinstance(job, Generate):
            time.sleep(self.options.step_s)
            return
        if job.seed == Fault.REFUSE:
            raise BadRequest("the text embeddings hold NaN")
        if job.seed == Fault.FATAL and self.options.rank == 0:
            raise Internal("a collective was left early")
        if job.seed == Fault.CRASH and self.options.rank == self.options.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while job.seed == Fault.HANG:
            time.sleep(60)
        is_exact = job.seed != Fault.INEXACT
        self.checks.append(
            FusedCheck(
                kernels="fake blocks",
                case=f"1 text + {job.width} image",
                error=0.001 if is_exact else None,
                tolerance=0.02,
                is_used=is_exact,
            )
        )
        step = 0
        while step < job.steps:
            self.wait_for_step(is_deaf=job.seed == Fault.DEAF)
            step += job.seed != Fault.DEAF
            if self.options.rank == 0:
                self.send(StepReached(**self.common(command), step=step, total_steps=job.steps, elapsed_s=0.1))

    def wait_for_step(self, *, is_deaf: bool) -> None:
        if self.socket.poll(int(self.options.step_s * 1000)):
            command = command_decoder.decode(self.socket.recv())
            if isinstance(command, CancelRun) and not is_deaf:
                raise Cancelled("stopped between two steps")

    def take_checks(self) -> tuple[FusedCheck, ...]:
        checks, self.checks = self.checks, []
        return tuple(checks)

    def tally(self) -> RankTally:
        return RankTally(
            loaded=len(self.plugged),
            skeletons_built=min(1, self.plugs),
            skeletons_reused=max(0, self.plugs - 1),
            plugs=self.plugs,
            memory_bytes=1000 * len(self.plugged),
            fused_checks=self.take_checks(),
        )


def read(exporter: ProcessIdentity, descriptor: int, offset: int, length: int) -> bytes:
    try:
        with open(f"/proc/{exporter.pid}/fd/{descriptor}", "rb") as block:
            block.seek(offset)
            return block.read(length)
    except OSError as error:
        raise StaleSource(f"descriptor {descriptor} of process {exporter.pid}: {error.strerror}") from error


def count_start(runtime_dir: str) -> int:
    """Count the groups that were started in this folder, beside the daemon's own files."""
    path = Path(runtime_dir) / "fake-starts"
    starts = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(starts))
    return starts


def lead(options: argparse.Namespace) -> int:
    """Start the ranks, and end with the first of them."""
    die_with_parent(os.getppid())
    options.starts = count_start(options.runtime_dir)
    print(f"fake leader start={options.starts} ranks={options.world_size}", flush=True)
    if options.exit_status is not None:
        print("attention backend warp: not installed; use auto", file=sys.stderr, flush=True)
        return int(options.exit_status)
    if options.never_ready:
        signal.pause()
    time.sleep(options.late_s)
    # Outside of the try block: its clean-up is the leader's, and a rank leaves through here.
    ranks = [start_rank(options, rank) for rank in range(options.world_size)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        first, status = os.wait()
        ranks.remove(first)
        if status != 0:
            return 1
        for rank in list(ranks):
            os.waitpid(rank, 0)
            ranks.remove(rank)
        return 0
    finally:
        for rank in ranks:
            # A SIGTERM may have come between the end of a rank and its removal from the list.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(rank, signal.SIGKILL)
                os.waitpid(rank, 0)


def start_rank(options: argparse.Namespace, rank: int) -> int:
    leader = os.getpid()
    child = os.fork()
    if child:
        return child
    die_with_parent(leader)
    options.rank = rank
    Rank(options).serve()
    sys.exit(0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--exit-status", type=int)
    parser.add_argument("--late-s", type=float, default=0.0)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--workers", default="auto")
    for flag in (
        "--runtime-dir",
        "--group-token",
        "--device",
        "--layout",
        "--attention-backend",
        "--kernels",
        "--precision",
        "--log-level",
    ):
        parser.add_argument(flag, required=True)
    options = parser.parse_args()
    options.world_size = 2 if options.workers == "auto" else int(options.workers)
    return lead(options)


if __name__ == "__main__":
    sys.exit(main())
