"""The protocol between the command loop, which handles messages, and the executor, which does a rank's work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from xditd.gpu_workers.jobs.finished import Finished
from xditd.ipc.errors import XditdError
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.outlines import Outline
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.status import LayoutReport, MemoryParts
from xditd.ipc.tensors import CopiedBytes, FileDigest
from xditd.ipc.worker_messages import DigestIo, Prepare, RankTally, Run

TimingsMs = dict[str, float]
"""Milliseconds by phase."""


class RankFacts(NamedTuple):
    """The facts of a rank that never change; the fields are those of ``RankReady``."""

    rank: int
    world_size: int
    device_kind: str
    device: str
    device_uuid: str
    parallel: dict[str, int]
    layout: LayoutReport
    attention_backend: str
    precision: str


class PreparedFacts(NamedTuple):
    """The result of preparing a component."""

    facts: ComponentFacts
    copied: CopiedBytes
    is_model_reused: bool
    timings_ms: TimingsMs


class JobChannel(Protocol):
    """The channel of a running job to the daemon: cancellation in, progress out."""

    def is_cancelled(self, wait_s: float = 0.0) -> bool:
        """Return whether the job was cancelled; wait for it up to ``wait_s``."""

    def report_step(self, step: int, total_steps: int, elapsed_s: float) -> None:
        """Report a finished step. Only rank 0 calls this."""

    def report_frames(self, frames: int, total_frames: int, elapsed_s: float) -> None:
        """Report decoded frames of a video. Only rank 0 calls this."""


class Executor(Protocol):
    """The work of one rank. Every rank of a group gets the same calls in the same order, one at a time.

    The command loop passes every error that a method raises to :meth:`explain`, and reports the result.
    """

    @property
    def facts(self) -> RankFacts:
        """The facts of this rank."""

    @property
    def idle_wait_s(self) -> float | None:
        """The longest wait for a command before the next :meth:`while_idle`; ``None``: no limit."""

    def while_idle(self) -> None:
        """Do work between two commands, a little at a time. Called at least every ``idle_wait_s``."""

    def take_digests(self) -> Mapping[str, tuple[FileDigest, ...]]:
        """Return new digests of lent files by component id, each once: a restarted group checks files against them."""

    def take_memory(self) -> MemoryParts | None:
        """Return a new count of this rank's memory, once."""

    def prepare(self, command: Prepare) -> PreparedFacts:
        """Do all parts of a lend that may fail. Running components are not changed."""

    def build_model(self, outline: Outline) -> tuple[TimingsMs, bool]:
        """Build the model of a component that will be lent, without weights; return whether it can be warmed up."""

    def warm_up_model(self, outline: Outline) -> TimingsMs:
        """Run a forward of a model that was built, on made weights, unless it has had weights."""

    def plug(self, component_id: str) -> TimingsMs:
        """Assign the tensors of a prepared component as its model's parameters."""

    def copy_component(self, component_id: str) -> tuple[CopiedBytes, TimingsMs]:
        """Copy a component into this rank's own memory, and unmap the client's."""

    def unmap(self, component_id: str, *, keeps_copies: bool = False) -> None:
        """Remove a component. An unknown id is no error, so that every rank can get the same undo command.

        With ``keeps_copies`` its copies of lent bytes stay for a :meth:`prepare` of the same memory.
        """

    def forget(self, client: ProcessIdentity) -> None:
        """Free all memory that is held for a client that has exited."""

    def digest_io(self, command: DigestIo) -> bytes:
        """Hash a range of a client's I/O block, as this rank reads it: part of the memory check."""

    def run(self, command: Run, job_channel: JobChannel) -> Finished:
        """Run a job.

        Raises:
            Cancelled: on every rank at the same step.
        """

    def tally(self) -> RankTally:
        """Return this rank's counters for the next report."""

    def after_answer(self) -> None:
        """Do work that no client should wait for, after a report was sent."""

    def explain(self, error: Exception) -> tuple[XditdError, bool]:
        """Return the error to report for ``error``, and whether it is fatal.

        It is fatal if this rank may now be in another state than the others: the rank ends, and the group with it.
        """

    def close(self) -> None:
        """Free everything before the process exits."""
