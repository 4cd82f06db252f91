"""Replies and events of the daemon: the closed union :data:`AnyReply`. Events come before a request's reply."""

from __future__ import annotations

from typing import Annotated

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Argument, ChangedArguments
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.field_types import Bytes, Count, Name
from xditd.ipc.job_parts import CutTexts
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import ComponentId, ErrorNames, Reply, Seconds, Text, TimingsMs
from xditd.ipc.status import DaemonStatus
from xditd.ipc.tensors import CopiedBytes, HostShmBlock, Tier


class Welcome(Reply, tag="welcome", frozen=True, kw_only=True):
    """Answers ``Hello``."""

    protocol_version: Count
    package_version: Name
    daemon_pid: Count
    max_message_bytes: Count = limits.MAX_MESSAGE_BYTES
    """The longest message that this daemon reads."""
    beat_every_s: Seconds = 15.0
    """How often the client has to send a message, a ``Beat`` if no other, to keep its loans."""
    world_size: Count
    """Workers that the group has, or will have once it is started; 0 while that is not known."""


class BeatHeard(Reply, tag="beat_heard", frozen=True, kw_only=True):
    """Answers ``Beat``."""


class Farewell(Reply, tag="farewell", frozen=True, kw_only=True):
    """Answers ``Goodbye``: the session's loans have ended."""


class MemoryChecked(Reply, tag="memory_checked", frozen=True, kw_only=True):
    """Answers ``CheckMemory``: BLAKE2b-128 of what each rank read, in rank order."""

    digests: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)], ...], msgspec.Meta(max_length=1024)
    ]


class Lent(Reply, tag="lent", frozen=True, kw_only=True):
    """Answers ``Lend``: every rank has mapped, verified and plugged the component.

    ``copied`` counts what the workers copied, over all ranks; ``is_reused`` means that the same bytes were lent already
    and nothing was done. ``timings_ms`` is the slowest rank's, by phase.
    """

    component_id: ComponentId
    facts: ComponentFacts
    tiers: tuple[Tier, ...]
    lent_bytes: Bytes
    copied: CopiedBytes
    is_reused: bool
    is_model_reused: bool
    timings_ms: TimingsMs


class Announced(Reply, tag="announced", frozen=True, kw_only=True):
    """Answers ``Announce``: the workers will build the model, unless they have other work until it is lent."""


class Returned(Reply, tag="returned", frozen=True, kw_only=True):
    """Answers ``ReturnLoan``: no worker maps the component any more."""


class Adopted(Reply, tag="adopted", frozen=True, kw_only=True):
    """Answers ``Adopt``. ``copied`` is over all ranks, ``timings_ms`` the slowest one's."""

    copied: CopiedBytes
    timings_ms: TimingsMs


class Revoked(Reply, tag="revoked", frozen=True, kw_only=True):
    """Answers ``Revoke``."""


class Generated(Reply, tag="generated", frozen=True, kw_only=True):
    """Answers ``Generate``: the outputs are in the I/O block. Timings are the slowest rank's, by phase.

    ``reused_steps`` is how many steps the step cache skipped, counted for each image of the batch.
    """

    timings_ms: TimingsMs
    reused_steps: Count = 0


class Called(Reply, tag="called", frozen=True, kw_only=True):
    """Answers ``Call``: a tree of tensors for each part, in the job's I/O block.

    They are in ``block`` instead if that is given: a block of the process ``provider``, which keeps the last few for
    each client. Large ones may be in the job's block of device memory, as each says.
    """

    results: Annotated[tuple[Argument, ...], msgspec.Meta(max_length=limits.MAX_PARTS)]
    changed: ChangedArguments = ()
    """For each part, the arguments that hold objects, as they are after the forward; empty if no part has any."""
    block: HostShmBlock | None = None
    provider: ProcessIdentity | None = None
    timings_ms: TimingsMs


class TensorsRead(Reply, tag="tensors_read", frozen=True, kw_only=True):
    """Answers ``ReadTensors``."""

    timings_ms: TimingsMs


class Decoded(Reply, tag="decoded", frozen=True, kw_only=True):
    """Answers ``Decode``."""

    timings_ms: TimingsMs


class Encoded(Reply, tag="encoded", frozen=True, kw_only=True):
    """Answers ``Encode``."""

    timings_ms: TimingsMs


class TextEncoded(Reply, tag="text_encoded", frozen=True, kw_only=True):
    """Answers ``EncodeText``."""

    timings_ms: TimingsMs


class PromptEncoded(Reply, tag="prompt_encoded", frozen=True, kw_only=True):
    """Answers ``EncodePrompt``: tensors, or lists of them, by the names in the transformer's facts.

    They are in the job's I/O block or, if that is given, in ``block`` of the process ``provider``. Without encoders,
    the tree has the token ids and masks of each encoder by its role. ``cut`` are the texts that were too long.
    """

    results: Argument
    cut: CutTexts = ()
    block: HostShmBlock | None = None
    provider: ProcessIdentity | None = None
    timings_ms: TimingsMs


class CancelNoted(Reply, tag="cancel_noted", frozen=True, kw_only=True):
    """Answers ``Cancel``, also if that request had ended already; its own reply says how it ended."""


class Status(Reply, tag="status", frozen=True, kw_only=True):
    """Answers ``GetStatus``."""

    daemon: DaemonStatus


class LogLines(Reply, tag="log_lines", frozen=True, kw_only=True):
    """Answers ``GetLogs``. Ask again with ``next_line`` to continue."""

    lines: Annotated[tuple[Text, ...], msgspec.Meta(max_length=limits.MAX_LOG_LINES)]
    next_line: Count


class Stopping(Reply, tag="stopping", frozen=True, kw_only=True):
    """Answers ``Stop``."""


class Failed(Reply, tag="failed", frozen=True, kw_only=True):
    """Answers any request that could not be served; ``code`` is one of :data:`xditd.ipc.errors.BY_CODE`."""

    code: Name
    detail: Text
    retry_after_s: Seconds | None = None
    """When to try again, if that is known."""
    names: ErrorNames = ()
    """All entries of the lists in ``detail``, which shows the first few."""


class Queued(Reply, tag="queued", frozen=True, kw_only=True):
    """Event: the job waits, and ``ahead`` others go first. ``reason`` says what it waits for."""

    ahead: Count
    reason: Text


class StepDone(Reply, tag="step_done", frozen=True, kw_only=True):
    """Event: step number ``step`` of ``total_steps`` is done."""

    step: Count
    total_steps: Count
    elapsed_s: Seconds


class FramesDecoded(Reply, tag="frames_decoded", frozen=True, kw_only=True):
    """Event: the first ``frames`` of the ``total_frames`` of a video are decoded, after all steps."""

    frames: Count
    total_frames: Count
    elapsed_s: Seconds


AnyEvent = Queued | StepDone | FramesDecoded

AnyReply = (
    Welcome
    | BeatHeard
    | Farewell
    | MemoryChecked
    | Announced
    | Lent
    | Returned
    | Adopted
    | Revoked
    | Generated
    | Called
    | TensorsRead
    | Decoded
    | Encoded
    | TextEncoded
    | PromptEncoded
    | CancelNoted
    | Status
    | LogLines
    | Stopping
    | Failed
    | Queued
    | StepDone
    | FramesDecoded
)
