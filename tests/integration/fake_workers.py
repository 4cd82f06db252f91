"""Fake workers without GPU and torch: real processes, the real command loop, and faults on request.

Started in place of ``python -m xditd.gpu_workers``, with the same flags. They map real descriptors of the
client's process, opened through /proc as the real workers do. A job's ``seed`` names a fault from :class:`Fault`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.process.command_loop import CommandLoop, DaemonChannel
from xditd.gpu_workers.process.executor import JobChannel, PreparedFacts, RankFacts
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.degrees import parse_layout
from xditd.ipc.errors import BadCheckpoint, BadRequest, Cancelled, Internal, StaleSource, XditdError
from xditd.ipc.facts import (
    ArgumentFacts,
    ComponentFacts,
    LatentFacts,
    LatentScaling,
    TextEncoderFacts,
    TransformerFacts,
    VaeFacts,
)
from xditd.ipc.layout_choice import choose_layout, report
from xditd.ipc.outlines import Outline
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call, Generate
from xditd.ipc.status import ForwardPath, FusedCheck, LoraCounts, MemoryParts, PackedProducts
from xditd.ipc.tensors import ComponentKind, CopiedBytes, CudaIpcBlock, FileDigest
from xditd.ipc.worker_messages import (
    STANDBY_BEGINS,
    STANDBY_FLAG,
    STANDBY_IMPORTED,
    CallResults,
    DigestIo,
    Prepare,
    RankTally,
    Run,
)

REFUSED_LABEL = "refused-by-the-last-rank"
WARM_LABEL = "has-a-warm-up"
STUCK_LABEL = "cannot-be-unmapped"
DEADLY_LABEL = "deadly"
"""Component labels that cause a fault."""


class Fault(enum.IntEnum):
    """Seeds that cause a fault in a job."""

    CRASH = 901
    """The last rank kills itself at the first step."""
    HANG = 902
    """No rank reports anything any more."""
    REFUSE = 903
    """Every rank refuses the job."""
    FATAL = 904
    """Rank 0 fails with ``is_fatal``."""
    INEXACT = 906
    """The fast path check refuses the fused kernels."""
    DEAF = 905
    """Steps continue for ever, and a cancel is ignored."""


LATENTS = LatentFacts(channels=4, pixels=8, scaling=LatentScaling(factor=1.0, shift=0.0))


def facts_of(kind: ComponentKind) -> ComponentFacts:
    """The facts that these workers report for each kind of component."""
    of_kind: dict[ComponentKind, dict[str, object]] = {
        ComponentKind.TRANSFORMER: {
            "transformer": TransformerFacts(
                heads=2,
                ulysses=2,
                ring=1,
                arguments=(ArgumentFacts(name="result", shape=()),),
                variants=("class",),
                conditioning=(ArgumentFacts(name="prompt_embeds", shape=("batch", "tokens", 4)),),
                latents=LATENTS,
                guidance="none",
                default_guidance_scale=0.0,
                default_steps=3,
            )
        },
        ComponentKind.VAE: {"vae": VaeFacts(latents=LATENTS, image_channels=3, has_encoder=True)},
        ComponentKind.TEXT_ENCODER: {"text_encoder": TextEncoderFacts(width=4, max_tokens=77, has_pooled=False)},
    }
    return ComponentFacts(
        family="fake", class_name="Fake", kind=kind, dtype="float32", bytes_by_dtype={"float32": 64}, **of_kind[kind]
    )


def die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


class FakeExecutor:
    """Replaces ``gpu_workers.process.torch_executor``; the command loop is the real one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.idle_wait_s = 0.0 if options.imports_s else None
        asked = parse_layout(options.layout)
        choice = choose_layout(options.world_size, asked)
        self.facts = RankFacts(
            rank=options.rank,
            world_size=options.world_size,
            device_kind="cpu",
            device="cpu",
            device_uuid="",
            parallel=choice.degrees.named(),
            layout=report(choice, asked),
            attention_backend="fake",
            precision="bf16",
        )
        self.options = options
        self.plugged: set[str] = set()
        self.known: set[str] = set()
        self.clients: set[ProcessIdentity] = set()
        """Clients whose jobs ran, until ``ForgetClient``."""
        self.plugs = 0
        self.checks: list[FusedCheck] = []
        self.built: list[str] = []
        """Labels of the models that were built ahead."""
        self.counted: MemoryParts | None = MemoryParts(
            weights_bytes=64, graphs_bytes=16, reserve_bytes=8, context_bytes=4
        )

    @property
    def is_last(self) -> bool:
        return self.facts.rank == self.facts.world_size - 1

    def while_idle(self) -> None:
        """With ``--imports-s``, imports something for so long, once."""
        if self.idle_wait_s is not None:
            self.idle_wait_s = None
            time.sleep(self.options.imports_s)

    def take_digests(self) -> dict[str, tuple[FileDigest, ...]]:
        return {}

    def build_model(self, outline: Outline) -> tuple[dict[str, float], bool]:
        if outline.label == REFUSED_LABEL and self.is_last:
            raise BadCheckpoint("no such model")
        self.built.append(outline.label)
        time.sleep(self.options.step_s)
        return {"build": 1.0}, outline.label == WARM_LABEL

    def warm_up_model(self, outline: Outline) -> dict[str, float]:
        print(f"warmed up {outline.label}", file=sys.stderr, flush=True)
        return {"warm_up": 1.0}

    def take_memory(self) -> MemoryParts | None:
        counted, self.counted = self.counted, None
        return counted

    def prepare(self, command: Prepare) -> PreparedFacts:
        manifest = command.manifest
        self.known.add(manifest.label)
        if manifest.label == REFUSED_LABEL and self.is_last:
            raise BadCheckpoint("tensor final.weight is missing")
        is_deadly = manifest.label.startswith(DEADLY_LABEL) and (self.options.starts > 1 or "now" in manifest.label)
        if is_deadly and self.is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        for block in manifest.blocks:
            if not isinstance(block, CudaIpcBlock):
                read(command.exporter, block.fd, 0, 1)
        copied = CopiedBytes(host_to_host=100)
        return PreparedFacts(
            facts_of(manifest.kind or ComponentKind.TRANSFORMER),
            copied,
            bool(self.plugs),
            {"map": 1.0 + self.facts.rank},
        )

    def plug(self, component_id: str) -> dict[str, float]:
        self.plugged.add(component_id)
        self.plugs += 1
        return {"plug": 0.5}

    def copy_component(self, component_id: str) -> tuple[CopiedBytes, dict[str, float]]:
        return CopiedBytes(host_to_host=64), {"copy": 1.0}

    def unmap(self, component_id: str, *, keeps_copies: bool = False) -> None:
        if STUCK_LABEL in self.known:
            raise BadRequest("a view is still open")
        self.plugged.discard(component_id)

    def forget(self, client: ProcessIdentity) -> None:
        self.clients.discard(client)

    def digest_io(self, command: DigestIo) -> bytes:
        content = read(command.exporter, command.io.fd, command.offset_bytes, command.length_bytes)
        return hashlib.blake2b(content, digest_size=16).digest()

    def run(self, command: Run, job_channel: JobChannel) -> Finished:
        finished = Finished({"steps": 2.0 + self.facts.rank}, 0)
        job = command.job
        self.clients.add(command.exporter)
        if not isinstance(job, Generate):
            time.sleep(self.options.step_s)
            if isinstance(job, Call):
                results = CallResults(trees=tuple(part.arguments.get("result") for part in job.parts))
                return finished._replace(results=results if self.facts.rank == 0 else None)
            return finished
        seed, steps = job.sampling.seed, job.sampling.steps
        if seed == Fault.REFUSE:
            raise BadRequest("the text embeddings hold NaN")
        if seed == Fault.FATAL and self.facts.rank == 0:
            raise Internal("a collective was left early")
        if seed == Fault.CRASH and self.is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        while seed == Fault.HANG:
            time.sleep(60)
        is_exact = seed != Fault.INEXACT
        self.checks.append(
            FusedCheck(
                kernels="fake blocks",
                case=f"1 text + {job.sampling.width} image",
                error=0.001 if is_exact else None,
                tolerance=0.02,
                is_used=is_exact,
            )
        )
        step = 0
        while step < steps:
            is_deaf = seed == Fault.DEAF
            if job_channel.is_cancelled(self.options.step_s) and not is_deaf:
                raise Cancelled("stopped between two steps")
            step += not is_deaf
            if self.facts.rank == 0:
                job_channel.report_step(step, steps, 0.1)
        for frames in range(5, job.sampling.frames + 1, 4):
            if self.facts.rank == 0:
                job_channel.report_frames(frames, job.sampling.frames, 0.1)
        return finished

    def tally(self) -> RankTally:
        checks, self.checks = self.checks, []
        paths = [
            ForwardPath(class_name="Fake", split="whole", shapes=each.case, path="eager", took_s=0.0, memory_bytes=0)
            for each in checks
        ]
        return RankTally(
            loaded=len(self.plugged),
            models_built=min(1, self.plugs),
            models_reused=max(0, self.plugs - 1),
            plugs=self.plugs,
            memory_bytes=1000 * len(self.plugged) + len(self.clients),
            fused_checks=tuple(checks),
            forward_paths=tuple(paths),
            packed_products=(PackedProducts(format="int8", reference=self.plugs, native=0),),
            loras=LoraCounts(jobs=self.plugs, forwards=self.plugs, launched=self.plugs),
        )

    def after_answer(self) -> None:
        """Nothing is measured."""

    def explain(self, error: Exception) -> tuple[XditdError, bool]:
        if isinstance(error, XditdError):
            return error, isinstance(error, Internal)
        return Internal(f"fake rank: {type(error).__name__}: {error}"), True

    def close(self) -> None:
        """Nothing is held."""


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
    with contextlib.suppress(OSError):  # a test has filled the folder
        path.write_text(str(starts))
    return starts


def lead(options: argparse.Namespace) -> int:
    """Start the ranks, and exit when the first of them ends."""
    die_with_parent(os.getppid())
    options.starts = count_start(options.runtime_dir)
    print(f"fake leader start={options.starts} ranks={options.world_size}", flush=True)
    if options.exit_status is not None:
        print("attention backend warp: not installed; use auto", file=sys.stderr, flush=True)
        return int(options.exit_status)
    if options.never_ready:
        signal.pause()
    time.sleep(options.late_s)
    # Outside of the try block, whose clean-up is only for the leader: a rank exits here.
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
    channel = DaemonChannel(RuntimeDir(Path(options.runtime_dir)))
    CommandLoop(channel, FakeExecutor(options), options.group_token).serve()
    sys.exit(0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--exit-status", type=int)
    parser.add_argument("--late-s", type=float, default=0.0)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--imports-s", type=float, default=0.0)
    parser.add_argument("--workers", default="auto")
    for flag in (
        "--runtime-dir",
        "--group-token",
        "--device",
        "--layout",
        "--attention-backend",
        "--kernels",
        "--precision",
        "--acceleration",
        "--native-products",
        "--log-level",
    ):
        parser.add_argument(flag, required=True)
    parser.add_argument("-m", help="nothing: a command that ends with -m xditd.gpu_workers gets a standby")
    words = sys.argv[1:]
    if words[-1] == STANDBY_FLAG:
        die_with_parent(os.getppid())
        os.write(0, STANDBY_IMPORTED)
        print("fake standby waits", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        os.write(0, STANDBY_BEGINS)
        words = [*words[:-1], *json.loads(line)]
    options = parser.parse_args(words)
    options.world_size = 2 if options.workers == "auto" else int(options.workers)
    return lead(options)


if __name__ == "__main__":
    sys.exit(main())
