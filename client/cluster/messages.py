"""What crosses from host to host: jobs, reports and results, as MessagePack of strict structs. Ray carries bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec

from xditd import __version__
from xditd.client.cluster.errors import error_named
from xditd.ipc.errors import BadMessage, BadRequest, ProtocolMismatch, XditdError
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.tensors import ComputeDType
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch

CLUSTER_VERSION: Final = 7
"""Raised with every change of a struct here."""

_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Versions(_Message, frozen=True, kw_only=True):
    """What must be equal on every host, so that a job gives the same bits on each and every message is understood."""

    xditd: str
    protocol: int
    cluster: int


HERE: Final = Versions(xditd=__version__, protocol=PROTOCOL_VERSION, cluster=CLUSTER_VERSION)


def check_versions(theirs: Versions, where: str, mine: Versions = HERE) -> None:
    """Refuse a peer of other versions by name.

    Raises:
        ProtocolMismatch: a version differs; the message has both.
    """
    for name in Versions.__struct_fields__:
        here, there = getattr(mine, name), getattr(theirs, name)
        if here != there:
            raise ProtocolMismatch(
                f"{where}: {name} version {there}, but {here} here; install the same xditd on every host of the cluster"
            )


class StoredTensor(_Message, frozen=True, kw_only=True):
    """A tensor by value. ``data`` is a view: of the tensor, or of the message that it was decoded from."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


StoredTensors = dict[str, StoredTensor | list[StoredTensor]]


class Job(_Message, frozen=True, kw_only=True):
    """A generation. Its seed is fixed by the caller, so that a second run has the same bits.

    ``transformer``, ``transformer_2`` and ``vae`` are content hashes. ``job_id`` is the same in each run. Conditioning
    and noise are sent apart, as :data:`StoredTensors`; noise has the name :data:`NOISE`.
    """

    versions: Versions
    job_id: str
    transformer: str
    vae: str | None
    height: int
    width: int
    steps: int | None
    sigmas: tuple[float, ...] | None
    guidance_scale: float | None
    seed: int | None
    step_cache: float
    variant: str
    options: dict[str, bool | int | float] | None
    compute_dtype: ComputeDType | None
    deadline_s: float | None
    frames: int = 1
    transformer_2: str | None = None
    """The transformer of the steps at low noise."""
    has_file_names: bool = False
    """Whether the tensors are a file's, of which the host selects those that the transformer's facts name."""

    @property
    def digests(self) -> tuple[str, ...]:
        """The contents that a host needs."""
        return tuple(each for each in (self.transformer, self.transformer_2, self.vae) if each is not None)

    @property
    def work(self) -> float:
        """The size of the job, by which the time of others is scaled: megapixels of all frames, times steps."""
        steps = self.steps if self.sigmas is None else len(self.sigmas)
        return self.height * self.width * self.frames / 1e6 * (steps or _USUAL_STEPS)


_USUAL_STEPS: Final = 20
"""Assumed where the family's default decides."""

NOISE: Final = " noise"
"""No argument of a model has a name with a space."""


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """The end of a job that succeeded; its tensors, ``latents`` and ``image``, are sent apart."""

    host: str
    seed: int | None
    timings_ms: dict[str, float]
    reused_steps: int
    was_resident: bool
    is_free: bool
    """Whether the host had no other job when this one ended, as far as it knew."""
    runs: int = 1
    record: Annotated[str, msgspec.Meta(max_length=2**20)] | None = None
    """How it was made, as JSON of :class:`~xditd.client.metadata.record.Record`."""
    image_dtype: ComputeDType | None = None
    """Of the result, that of the VAE."""


class Refused(_Message, frozen=True, kw_only=True, tag="failed"):
    """The error that ended a job."""

    host: str
    code: str
    detail: str
    retry_after_s: float | None = None
    names: tuple[str, ...] = ()

    def error(self) -> XditdError:
        """Return the error, to be raised."""
        return error_named(self.code, self.detail, self.retry_after_s, self.names)


Outcome = Done | Refused


class Placed(_Message, frozen=True, kw_only=True, tag="placed"):
    """The host that a job is to run on, and which agent that host had when it last reported."""

    host: str
    agent: str


class Unplaced(_Message, frozen=True, kw_only=True, tag="unplaced"):
    """Why no host can run a job now. ``may_change`` if a host that is lost may come back within seconds."""

    reason: Refused
    may_change: bool


Placement = Placed | Unplaced


class HostReport(_Message, frozen=True, kw_only=True, tag="report"):
    """A host's state. All times were measured by its own clock, and no two hosts' clocks are compared."""

    versions: Versions
    host: str
    agent: str
    """Another one after each start of the agent."""
    is_serving: bool
    is_starting: bool
    """Whether its workers start, so that jobs which are sent now wait for them."""
    detail: str
    """Why it does not serve; empty if it does."""
    files: dict[str, int]
    """Content hashes of the files that it can lend, with their sizes in bytes."""
    resident: tuple[str, ...]
    """Content hashes of the components that its workers hold."""
    running: dict[str, float]
    """The work of each of the agent's jobs, by job id."""
    other_jobs: int
    """Jobs in the daemon that other clients of this host have sent."""
    pace: dict[str, _Seconds]
    """Seconds for each unit of work, by transformer, measured."""
    mean_job_s: _Seconds
    """Of the last jobs; 0 before the first."""
    lend_bytes_per_s: _Seconds
    """Measured; 0 before the first lend."""


def refusal(host: str, error: XditdError) -> Refused:
    """Describe an error for the wire."""
    return Refused(
        host=host, code=error.code, detail=error.detail, retry_after_s=error.retry_after_s, names=error.names
    )


def store(tensors: Mapping[str, Any]) -> StoredTensors:
    """Describe tensors for the wire. Those on the CPU are viewed: do not change them before they are encoded."""
    return {
        name: [_stored(each) for each in value] if isinstance(value, list) else _stored(value)
        for name, value in tensors.items()
    }


def load(stored: StoredTensors) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Make CPU tensors of messages; the caller owns them.

    Raises:
        BadMessage: a size or dtype that no tensor has.
    """
    return {
        name: [_loaded(name, each) for each in value] if isinstance(value, list) else _loaded(name, value)
        for name, value in stored.items()
    }


def _stored(tensor: torch.Tensor) -> StoredTensor:
    plain = tensor.detach().cpu().contiguous()
    return StoredTensor(dtype=dtype_name(plain.dtype), shape=tuple(plain.shape), data=_bytes_of(plain))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if not tensor.nbytes:
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # the view keeps the array, and the array its memory
    return memoryview(array).cast("B")


def _loaded(name: str, stored: StoredTensor) -> torch.Tensor:
    import torch

    try:
        dtype = torch_dtype(stored.dtype)
        data = bytearray(stored.data)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(stored.shape)
    except (AttributeError, KeyError, RuntimeError, ValueError, BadRequest) as error:
        raise BadMessage(f"{name}: {stored.data.nbytes} bytes are no {stored.dtype} tensor {stored.shape}") from error


T = TypeVar("T")


def encode(message: object) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """Decode a message; tensors in it are views of ``data``.

    Raises:
        BadMessage: other fields or types than this version's.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise BadMessage(f"message of the cluster: {error}; install the same xditd on every host") from error
