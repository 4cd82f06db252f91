"""Messages between the daemon and the ranks: the closed unions :data:`AnyCommand` and :data:`AnyReport`.

Every rank receives the same commands in the same order. ``op_number`` counts commands since the group started; a report
names the command that it answers and its rank.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Argument, ChangedArguments
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.field_types import Bytes, Count, Described, Name
from xditd.ipc.job_parts import CutTexts
from xditd.ipc.outlines import Outline
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import ComponentId, ErrorNames, Message, Seconds, Text, TimingsMs
from xditd.ipc.requests import InferenceRequest
from xditd.ipc.status import (
    ForwardPath,
    FusedCheck,
    LayoutReport,
    LoraCounts,
    MemoryParts,
    PackedProducts,
    SplitCheck,
)
from xditd.ipc.tensors import CopiedBytes, Digest, FileDigest, HostShmBlock, Manifest, TensorNames

FileDigests = Annotated[tuple[FileDigest, ...], msgspec.Meta(max_length=limits.MAX_BLOCKS)]

CONFIGURATION_STATUS: Final = 2
"""Exit status of a leader or a rank when a restart cannot help: a wrong setting, installation or limit."""

STANDBY_FLAG: Final = "--standby"
"""The only flag of a leader that imports first and then reads its flags from stdin, as one line with a JSON list.

Its stdin is a socket, on which it says :data:`STANDBY_IMPORTED` and, once it has the flags, :data:`STANDBY_BEGINS`.
"""

STANDBY_IMPORTED: Final = b"i"
STANDBY_BEGINS: Final = b"b"

VERDICT_PREFIX: Final = "worker group: "
"""Begins the line in which a leader prints why the group has ended."""

UNEXPLAINED: Final = "and did not say why"
"""Ends such a line if the leader does not know the cause; the processes' output may show it."""


class Command(Message, frozen=True, kw_only=True):
    """Base of commands, which the daemon sends to every rank."""

    op_number: Count


class Prepare(Command, tag="prepare", frozen=True, kw_only=True):
    """First phase of a lend: map and verify, so that plugging cannot fail. Answered by ``Prepared``.

    ``exporter`` is the client's process, from the socket's credentials. ``digests``, from :class:`FilesDigested`, are
    given when the component is mapped again: for files of which only the ctime has changed since. ``changed`` are the
    tensors whose bytes are others than those of the copies that an ``Unmap`` has kept.
    """

    component_id: ComponentId
    manifest: Manifest
    exporter: ProcessIdentity
    digests: FileDigests = ()
    changed: TensorNames | None = None


class BuildModel(Command, tag="build_model", frozen=True, kw_only=True):
    """Build the model of a component that will be lent, and keep it without weights. Answered by ``ModelBuilt``."""

    outline: Outline


class WarmUpModel(Command, tag="warm_up_model", frozen=True, kw_only=True):
    """Run a forward of a model that was built, on made weights, unless it has had weights. Answered by ``Done``."""

    outline: Outline


class Plug(Command, tag="plug", frozen=True, kw_only=True):
    """Second phase, once every rank is prepared: plug the tensors into the model. Answered by ``Plugged``."""

    component_id: ComponentId


class Unmap(Command, tag="unmap", frozen=True, kw_only=True):
    """Drop a component, prepared or plugged, and unmap its memory. Answered by ``Done``.

    With ``keeps_copies``, ranks keep their own copies of lent bytes for the ``Prepare`` of the same memory that comes
    next.
    """

    component_id: ComponentId
    keeps_copies: bool = False


class CopyComponent(Command, tag="copy_component", frozen=True, kw_only=True):
    """Copy a plugged component into the rank's own memory, and unmap the client's. Answered by ``ComponentCopied``."""

    component_id: ComponentId


class ForgetClient(Command, tag="forget_client", frozen=True, kw_only=True):
    """Close the I/O blocks of a client that has ended, and free its kept tensors. Answered by ``Done``."""

    exporter: ProcessIdentity


class DigestIo(Command, tag="digest_io", frozen=True, kw_only=True):
    """Hash part of a client's I/O block. Answered by ``IoDigested``."""

    io: HostShmBlock
    offset_bytes: Bytes
    length_bytes: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    exporter: ProcessIdentity


class Run(Command, tag="run", frozen=True, kw_only=True):
    """Run a job. Answered by ``Done``; ``StepReached`` comes from rank 0 after every step of ``Generate``, and
    ``FramesReached`` after every chunk of a video that is decoded."""

    job: InferenceRequest
    exporter: ProcessIdentity


class CancelRun(Command, tag="cancel_run", frozen=True, kw_only=True):
    """Stop the running job ``target_op_number`` at its next step or chunk of frames, unless it has ended.

    Not answered.
    """

    target_op_number: Count


class Shutdown(Command, tag="shutdown", frozen=True, kw_only=True):
    """Unmap everything and exit. Not answered; the leader's exit is the answer."""


AnyCommand = (
    BuildModel
    | WarmUpModel
    | Prepare
    | Plug
    | CopyComponent
    | Unmap
    | ForgetClient
    | DigestIo
    | Run
    | CancelRun
    | Shutdown
)


class Report(Message, frozen=True, kw_only=True):
    """Base of reports of a rank to the daemon. ``group_token`` identifies the group since its last start."""

    group_token: Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
    rank: Annotated[int, msgspec.Meta(ge=0, le=1023)]


class RankReady(Report, tag="rank_ready", frozen=True, kw_only=True):
    """The rank is ready: libraries imported, process group formed, nothing loaded."""

    world_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    pid: Count
    device_kind: Name
    device: Name
    device_uuid: Text
    parallel: Annotated[dict[str, Count], msgspec.Meta(max_length=16)]
    layout: LayoutReport
    attention_backend: Name
    precision: Name


class FilesDigested(Report, tag="files_digested", frozen=True, kw_only=True):
    """Files of a plugged component were digested. Sent by rank 0, and not an answer."""

    component_id: ComponentId
    digests: FileDigests


class MemoryCounted(Report, tag="memory_counted", frozen=True, kw_only=True):
    """An idle rank has counted its memory. Not an answer."""

    memory: MemoryParts


class Answer(Report, frozen=True, kw_only=True):
    """Answers the command ``op_number``."""

    op_number: Count


class Prepared(Answer, tag="prepared", frozen=True, kw_only=True):
    facts: ComponentFacts
    copied: CopiedBytes
    is_model_reused: bool
    timings_ms: TimingsMs


class Plugged(Answer, tag="plugged", frozen=True, kw_only=True):
    timings_ms: TimingsMs
    tally: RankTally


class ComponentCopied(Answer, tag="component_copied", frozen=True, kw_only=True):
    copied: CopiedBytes
    timings_ms: TimingsMs
    tally: RankTally


class IoDigested(Answer, tag="io_digested", frozen=True, kw_only=True):
    digest: Digest


class CallResults(Described, frozen=True, kw_only=True):
    """The results in ``Called``; ``block`` is one of the rank's own process."""

    trees: Annotated[tuple[Argument, ...], msgspec.Meta(max_length=limits.MAX_PARTS)]
    changed: ChangedArguments = ()
    block: HostShmBlock | None = None
    provider: ProcessIdentity | None = None


class Done(Answer, tag="done", frozen=True, kw_only=True):
    """``reused_steps`` is that of ``Generated``; 0 for other commands."""

    timings_ms: TimingsMs
    tally: RankTally
    reused_steps: Count = 0
    results: CallResults | None = None
    """Of ``Call`` and ``EncodePrompt``, from rank 0."""
    cut: CutTexts = ()
    """Of ``EncodePrompt``, from rank 0."""


class ModelBuilt(Answer, tag="model_built", frozen=True, kw_only=True):
    """``has_warm_up``: the first forward of this model takes much longer than later ones, and can be warmed up."""

    timings_ms: TimingsMs
    tally: RankTally
    has_warm_up: bool = False


class RankFailed(Answer, tag="rank_failed", frozen=True, kw_only=True):
    """The command failed on this rank. ``is_fatal``: its state may differ from other ranks', so the group must end."""

    code: Name
    detail: Text
    is_fatal: bool
    names: ErrorNames = ()
    """As in ``Failed``."""


class StepReached(Answer, tag="step_reached", frozen=True, kw_only=True):
    """Progress of ``Generate``: a step is done."""

    step: Count
    total_steps: Count
    elapsed_s: Seconds


class FramesReached(Answer, tag="frames_reached", frozen=True, kw_only=True):
    """Progress of a decode of a video: its first ``frames`` are done."""

    frames: Count
    total_frames: Count
    elapsed_s: Seconds


class RankTally(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counters of one rank since its start, and new fast path checks, sent with answers."""

    loaded: Count = 0
    models_built: Count = 0
    models_reused: Count = 0
    plugs: Count = 0
    outside_connections: Count = 0
    """Connections to other hosts that were attempted; without one, nothing can have been downloaded."""
    memory_bytes: Bytes = 0
    fused_checks: Annotated[tuple[FusedCheck, ...], msgspec.Meta(max_length=limits.MAX_FUSED_CHECKS)] = ()
    """Fast path checks since the last tally; nearly always none."""
    split_checks: Annotated[tuple[SplitCheck, ...], msgspec.Meta(max_length=limits.MAX_SPLIT_CHECKS)] = ()
    """Checks of rows since the last tally; of rank 0 alone, since all ranks have the same."""
    forward_paths: Annotated[tuple[ForwardPath, ...], msgspec.Meta(max_length=limits.MAX_FORWARD_PATHS)] = ()
    """Decisions on the paths of forwards since the last tally."""
    packed_products: Annotated[tuple[PackedProducts, ...], msgspec.Meta(max_length=limits.MAX_PACKED_FORMATS)] = ()
    """Counted since the start of the rank; of rank 0 alone."""
    loras: LoraCounts = LoraCounts()
    """The same."""


AnyReport = (
    RankReady
    | FilesDigested
    | MemoryCounted
    | Prepared
    | Plugged
    | ComponentCopied
    | ModelBuilt
    | IoDigested
    | Done
    | RankFailed
    | StepReached
    | FramesReached
)
