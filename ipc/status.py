"""The daemon's state as ``xditd status`` shows it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.field_types import Bytes, Count, Described, Name
from xditd.ipc.packed import PackedFormat
from xditd.ipc.protocol import ComponentId, Milliseconds, RelativeError, RequestId, Seconds, Text, TimingsMs
from xditd.ipc.renamed import Renamed
from xditd.ipc.tensors import ComponentKind, CopiedBytes, Tier


class GroupState(Enum):
    """State of a worker group; the transitions are in :mod:`xditd.daemon.groups.lifecycle`."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DEAD = "dead"
    GIVEN_UP = "given_up"


class LeaseState(Enum):
    """State of a lease; the transitions are in :mod:`xditd.daemon.loans.leases`."""

    LENDING = "lending"
    LENT = "lent"
    ADOPTED = "adopted"
    RETURNING = "returning"
    ENDED = "ended"


class JobState(Enum):
    """State of a job; the transitions are in :mod:`xditd.daemon.queue.jobs`."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"


class MemoryParts(Described, frozen=True, kw_only=True):
    """What a rank holds of its GPU's memory, counted while it was idle. Mapped memory of clients is not among it."""

    weights_bytes: Bytes = 0
    """Copies of lent weights, and weights that were made of them."""
    scratch_bytes: Bytes = 0
    """Into which packed weights are dequantised, one at a time."""
    graphs_bytes: Bytes = 0
    """Of captured forwards, which share it."""
    exchange_bytes: Bytes = 0
    """To which other ranks write."""
    tensors_bytes: Bytes = 0
    """Other tensors: tables, kept ones of clients, factors of LoRAs, workspaces of libraries."""
    reserve_bytes: Bytes = 0
    """Free, and kept for the next job; it is given back after some seconds without one."""
    context_bytes: Bytes | None = None
    """Of CUDA and its libraries: kernels, communicators, graphs' launches; ``None`` if the driver does not say."""

    @property
    def by_part(self) -> dict[str, int]:
        """Bytes by the name of the part, without one that is not known."""
        given = {name.removesuffix("_bytes"): getattr(self, name) for name in self.__struct_fields__}
        return {part: size for part, size in given.items() if size is not None}

    @property
    def beyond_weights_bytes(self) -> int:
        """All but the weights, as far as it is known."""
        return sum(self.by_part.values()) - self.weights_bytes


class WorkerStatus(Described, frozen=True, kw_only=True):
    """One rank. ``memory_bytes`` is the memory of its GPU in use by all processes; 0 on CPU."""

    rank: Count
    pid: Count
    device: Name
    device_uuid: Text
    memory_bytes: Bytes
    loaded: Count
    """Components that are mapped."""
    memory: MemoryParts | None = None
    """``None`` until the rank has been idle for a second."""


class ComponentStatus(Described, frozen=True, kw_only=True):
    component_id: ComponentId
    label: Name
    kind: ComponentKind | None
    facts: ComponentFacts | None
    """``None`` until the workers have reported them."""
    state: LeaseState
    tiers: tuple[Tier, ...]
    lent_bytes: Bytes
    copied: CopiedBytes
    generation: Count
    owner_pid: Count
    """0 for a component that was adopted."""
    lend_ms: TimingsMs


class JobStatus(Described, frozen=True, kw_only=True):
    request_id: RequestId
    op: Name
    state: JobState
    owner_pid: Count
    step: Count
    total_steps: Count
    waited_s: Seconds
    ran_s: Seconds


class ErrorStatus(Described, frozen=True, kw_only=True):
    """One of the last errors. ``where`` is the operation that failed, or ``workers`` for a lost group."""

    age_s: Seconds
    where: Name
    code: Name
    detail: Text


class Counters(Described, frozen=True, kw_only=True):
    """Counted since the daemon started, but ``models_*`` and ``plugs`` since the group started."""

    group_starts: Count = 0
    jobs_done: Count = 0
    jobs_failed: Count = 0
    jobs_cancelled: Count = 0
    models_built: Count = 0
    models_reused: Count = 0
    plugs: Count = 0
    outside_connections: Count = 0
    """Connections to other hosts that any worker attempted; without one, nothing can have been downloaded."""
    skeletons_built: ClassVar[Renamed] = Renamed("models_built")
    skeletons_reused: ClassVar[Renamed] = Renamed("models_reused")


class LayoutCandidate(Described, frozen=True, kw_only=True):
    """A possible layout, in the setting's format, and why it was not chosen: empty for the chosen one."""

    layout: Name
    why_not: Text


class LayoutReport(Described, frozen=True, kw_only=True):
    """The parallel layout of a group: what was asked for, the reason for the choice, and all candidates."""

    asked: Text
    reason: Text
    candidates: Annotated[tuple[LayoutCandidate, ...], msgspec.Meta(max_length=limits.MAX_LAYOUT_CANDIDATES)]


class FusedCheck(Described, frozen=True, kw_only=True):
    """A fast path check: fused kernels compared with unmodified modules, at the first forward of so many tokens."""

    kernels: Name
    case: Name
    """The tokens of a forward on that rank."""
    error: RelativeError | None
    """Relative error of the result; ``None`` if it was not finite."""
    tolerance: RelativeError
    is_used: bool
    """Whether the kernels are used. Once refused, they are not used for any number of tokens."""


class SplitCheck(Described, frozen=True, kw_only=True):
    """A check of a module that runs as its class: one call split over the ranks, compared with the same call whole."""

    class_name: Name
    method: Name
    split: Literal["rows", "tokens"] = "rows"
    """What ranks share: the rows of the batch, or the tokens of each row."""
    batch: Count
    error: RelativeError | None
    """Relative error of the result; ``None`` if the call could not be split, or compared."""
    tolerance: RelativeError
    is_used: bool
    """Whether such calls are split so. A call that is split in no way runs whole on every rank."""
    detail: Text = ""
    """Why it is not split so."""


class ForwardPath(Described, frozen=True, kw_only=True):
    """The path that the forwards of one case take from now on."""

    class_name: Name
    split: Literal["whole", "tokens"]
    """Whether ranks share the tokens of such a forward, or one rank runs all of it."""
    shapes: Text
    """The shapes of the tensors among its arguments, in order."""
    path: Literal["eager", "compiled", "captured", "compiled, captured"]
    """Kernel by kernel, with compiled blocks, as a CUDA graph, or both."""
    error: RelativeError | None = None
    """Relative error of compiled blocks against the eager forward; ``None`` if they were not compared. A graph has the
    bits of the forward that it was captured from."""
    took_s: Seconds
    """How long capturing and comparing took, between two jobs; the compiler's own process is not in it."""
    memory_bytes: Bytes
    """GPU memory that its new graph took on one rank, beyond what other graphs have; 0 without a new one."""
    detail: Text = ""
    """Why it is not compiled or not captured."""


class PackedProducts(Described, frozen=True, kw_only=True):
    """How often layers of one packed format were multiplied on rank 0 since the group started, and how."""

    format: PackedFormat
    reference: Count
    """Products of dequantised weights."""
    native: Count
    """Products of the packed weights themselves, with a quantised input."""
    why_not_native: Annotated[dict[Text, Count], msgspec.Meta(max_length=limits.MAX_PACKED_REASONS)] = msgspec.field(
        default_factory=dict
    )
    """How many of ``reference`` were not native for each reason, the most frequent first; bounded."""


class LoraCounts(Described, frozen=True, kw_only=True):
    """Jobs with LoRAs on rank 0 since the group started."""

    jobs: Count = 0
    switches: Count = 0
    """How often the LoRAs of a model were switched on, each time by reference: no weight is copied or written."""
    last_switch_ms: Milliseconds = 0.0
    slowest_switch_ms: Milliseconds = 0.0
    bound: Count = 0
    """How often the layers of a LoRA were found in a model: once for each pair of them."""
    converted_bytes: Bytes = 0
    """Bytes of factors that were copied into the compute dtype of a model; once for each LoRA and dtype."""
    detail: Text = ""
    """Why the forwards of the last such job did not take the path that they take without LoRAs."""
    forwards: Count = 0
    """Forwards with LoRAs, of fused blocks and of modules that run as their class."""
    launched: Count = 0
    """Those among them that were CUDA graphs."""
    layouts: Count = 0
    """Sets of layers and ranks for which memory was made that graphs read. Each has graphs of its own; LoRAs of one set
    share them."""
    copied_bytes: Bytes = 0
    """Bytes of factors that were copied into that memory; no weight of a model is among them."""
    memory_bytes: Bytes = 0
    """Bytes of that memory, and of other copies of several LoRAs' factors."""


class DaemonStatus(Described, frozen=True, kw_only=True):
    package_version: Name
    protocol_version: Count
    pid: Count
    uptime_s: Seconds
    runtime_dir: Text
    group_state: GroupState
    group_detail: Text
    device_kind: Text
    world_size: Count
    parallel: Annotated[dict[str, Count], msgspec.Meta(max_length=16)]
    layout: LayoutReport | None
    """``None`` until the workers have reported it."""
    attention_backend: Text
    precision: Text
    """How a transformer's matrix products run: ``bf16``, as lent, or ``fp8``. Empty while no group is ready."""
    fused_checks: Annotated[tuple[FusedCheck, ...], msgspec.Meta(max_length=limits.MAX_FUSED_CHECKS)]
    """Fast path checks since the group started, oldest first; bounded."""
    split_checks: Annotated[tuple[SplitCheck, ...], msgspec.Meta(max_length=limits.MAX_SPLIT_CHECKS)] = ()
    """Checks of rows since the group started, oldest first; bounded."""
    forward_paths: Annotated[tuple[ForwardPath, ...], msgspec.Meta(max_length=limits.MAX_FORWARD_PATHS)] = ()
    """Decisions on the paths of forwards since the group started, oldest first; bounded."""
    packed_products: Annotated[tuple[PackedProducts, ...], msgspec.Meta(max_length=limits.MAX_PACKED_FORMATS)] = ()
    """The products of packed weights, one entry for each format that was multiplied."""
    loras: LoraCounts = LoraCounts()
    workers: tuple[WorkerStatus, ...]
    components: tuple[ComponentStatus, ...]
    jobs: tuple[JobStatus, ...]
    queue_limit: Count
    clients: Count
    counters: Counters
    lent_bytes: Annotated[dict[str, Bytes], msgspec.Meta(max_length=8)]
    """Bytes of tensors that are lent now, by tier."""
    last_errors: Annotated[tuple[ErrorStatus, ...], msgspec.Meta(max_length=limits.MAX_LAST_ERRORS)]
    """The last errors, newest first; bounded."""
    last_job_ms: TimingsMs
