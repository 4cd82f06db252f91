"""What a rank can do, without a word on how it is asked: the command loop owns messages, an executor the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from xditd.gpu_workers.jobs.finished import Finished
from xditd.ipc.errors import XditdError
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.status import LayoutReport
from xditd.ipc.tensors import CopiedBytes, FileDigest
from xditd.ipc.worker_messages import DigestIo, Prepare, RankTally, Run

TimingsMs = dict[str, float]
"""Milliseconds by phase."""


class RankFacts(NamedTuple):
    """What a rank is, for as long as it lives; the fields are those of ``RankReady``."""

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
    """What preparing a component came to."""

    facts: ComponentFacts
    copied: CopiedBytes
    is_model_reused: bool
    timings_ms: TimingsMs


class JobContact(Protocol):
    """A running job's line to the daemon."""

    def is_cancelled(self, wait_s: float = 0.0) -> bool:
        """Whether the job was cancelled by now, or is within ``wait_s``."""

    def tell(self, step: int, total_steps: int, elapsed_s: float) -> None:
        """Report a step. Of all ranks, the first one does."""


class Executor(Protocol):
    """The work of one rank. Every rank of a group gets the same calls in the same order, and one at a time.

    What a call raises is answered as :meth:`explain` says; all other errors are the executor's own defects.
    """

    @property
    def facts(self) -> RankFacts:
        """What this rank is."""

    @property
    def idle_wait_s(self) -> float | None:
        """How long the loop may wait for a command before :meth:`while_idle`; ``None``: for ever."""

    def while_idle(self) -> None:
        """Do what is due between two commands. Called at least every ``idle_wait_s``."""

    def take_digests(self) -> Mapping[str, tuple[FileDigest, ...]]:
        """Hand out digests of lent files by component id, each once: ranks of a rebuilt group compare with them."""

    def prepare(self, command: Prepare) -> PreparedFacts:
        """Do everything about a lend that may fail. Nothing that runs is touched."""

    def plug(self, component_id: str) -> TimingsMs:
        """Put a prepared component to work."""

    def keep(self, component_id: str) -> tuple[CopiedBytes, TimingsMs]:
        """Copy a component into memory of this rank's own, and unmap what its client lent."""

    def unmap(self, component_id: str) -> None:
        """Forget a component. Unknown is no error, so that an undo can be sent to every rank."""

    def forget(self, client: ProcessIdentity) -> None:
        """Free what is kept for a client that is gone."""

    def digest_io(self, command: DigestIo) -> bytes:
        """Digest a stretch of a client's I/O block, as this rank reads it."""

    def run(self, command: Run, contact: JobContact) -> Finished:
        """Run a job to its end.

        Raises:
            Cancelled: on every rank at the same step.
        """

    def tally(self) -> RankTally:
        """Count what this rank holds and has done, for the answer that is about to leave."""

    def after_answer(self) -> None:
        """Do what no client should wait for, once an answer has left."""

    def explain(self, error: Exception) -> tuple[XditdError, bool]:
        """Say what an error is to the client, and whether it may leave this rank out of step with the others.

        A rank that is out of step ends, and the group with it.
        """

    def close(self) -> None:
        """Let go of everything; the process is about to exit."""
