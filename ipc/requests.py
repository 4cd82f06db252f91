"""What a client may ask of the daemon: the closed union :data:`AnyRequest`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Arguments, Finite, Whole
from xditd.ipc.facts import LatentScaling
from xditd.ipc.protocol import ComponentId, Request, RequestId
from xditd.ipc.tensors import Bytes, CopiedBytes, Count, Described, HostShmBlock, IoTensor, Manifest, Name

Side = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE_PIXELS)]
Unit = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Guidance = Annotated[float, msgspec.Meta(ge=0.0, le=limits.MAX_GUIDANCE)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Role = Literal["transformer", "vae"]
"""What a component is to a generation."""


class Hello(Request, tag="hello", frozen=True, kw_only=True):
    """Open a session. Nothing else is served before it. Answered by ``Welcome``."""

    protocol_version: Count
    package_version: Name
    client_name: Name


class Beat(Request, tag="beat", frozen=True, kw_only=True):
    """A sign of life, sent every ``Welcome.beat_every_s``: a session that is silent ends. Answered by ``BeatHeard``."""


class Goodbye(Request, tag="goodbye", frozen=True, kw_only=True):
    """Close the session and end its loans. Answered by ``Farewell``; a dead process needs no goodbye."""


class CheckMemory(Request, tag="check_memory", frozen=True, kw_only=True):
    """Ask every worker what it reads in a stretch of the client's I/O block. Answered by ``MemoryChecked``."""

    io: HostShmBlock
    offset_bytes: Bytes
    length_bytes: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class Lend(Request, tag="lend", frozen=True, kw_only=True):
    """Lend a component to the workers until ``ReturnLoan``, ``Goodbye`` or the client's death.

    Answered by ``Lent`` once every rank has mapped, verified and plugged it. ``copied`` is what the
    client itself copied to make the tensors lendable, so that the daemon's totals are honest.
    """

    manifest: Manifest
    copied: CopiedBytes = CopiedBytes()


class ReturnLoan(Request, tag="return_loan", frozen=True, kw_only=True):
    """Take a component back. Answered by ``Returned`` once no worker maps it any more."""

    component_id: ComponentId


class Adopt(Request, tag="adopt", frozen=True, kw_only=True):
    """Make a loan the workers' own: each copies what it maps of it, once. It then outlives its client.

    Answered by ``Adopted`` once no worker maps the client's memory any more. ``Revoke`` frees it.
    """

    component_id: ComponentId


class Revoke(Request, tag="revoke", frozen=True, kw_only=True):
    """End a loan, or free an adopted component, whoever lent it. Its jobs fail with ``lease_lost``.

    Answered by ``Revoked`` once no worker maps or holds it.
    """

    component_id: ComponentId


class Part(Described, frozen=True, kw_only=True):
    """One forward: its arguments, named as in the signature of the component's class."""

    arguments: Arguments


class Call(Request, tag="call", frozen=True, kw_only=True):
    """Run a transformer's ``forward`` once for each part. Answered by ``Called``.

    Nothing is merged, padded or cast: a part gives what the class gives in the client's own process. Parts are
    independent, and may run on different ranks. ``foreseen`` are values of an argument in calls to come, in its units:
    they change no bit. ``variant`` is ``class``, or another one that the component's facts name.
    ``out`` is where in ``io`` results may be written; longer ones come in a block of the workers'.
    """

    component_id: ComponentId
    io: HostShmBlock
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_PARTS)]
    foreseen: Annotated[
        dict[Name, Annotated[tuple[Finite, ...], msgspec.Meta(max_length=limits.MAX_STEPS)]],
        msgspec.Meta(max_length=limits.MAX_FORESEEN),
    ] = msgspec.field(default_factory=dict)
    variant: Name = "class"
    out_offset_bytes: Bytes
    out_size_bytes: Bytes


class Sampling(Described, frozen=True, kw_only=True):
    """How a generation runs, in words that all families share.

    ``sigmas`` has ``steps`` descending values in (0, 1], used verbatim; the final 0 is implied, as in diffusers.
    Without it, the family's own schedule runs. ``guidance_scale`` is the family's own where it is ``None``.
    ``options`` are those of the family, by the names of its facts; others are refused.
    With a ``step_cache_threshold`` above 0, a step whose first block changes the image by less than that, relative to
    what it did at the last step that was computed, takes over what all other blocks did there: not lossless.
    """

    height: Side
    width: Side
    steps: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_STEPS)]
    sigmas: Annotated[tuple[Unit, ...], msgspec.Meta(max_length=limits.MAX_STEPS)] | None = None
    guidance_scale: Guidance | None = None
    seed: Seed | None = None
    step_cache_threshold: Unit = 0.0
    variant: Name = "class"
    options: Annotated[dict[Name, bool | Whole | Finite], msgspec.Meta(max_length=64)] = msgspec.field(
        default_factory=dict
    )


class Generate(Request, tag="generate", frozen=True, kw_only=True):
    """Run the whole denoising loop in the workers. Events ``Queued``, ``StepDone``; reply ``Generated``.

    ``components`` are named by role: a ``transformer``, and a ``vae`` where ``out_image`` is asked for.
    ``conditioning`` is by name, as the transformer's facts list it. All tensors lie in ``io`` or are kept. Shapes:
    ``noise`` and ``out_latents`` as the facts' latents, ``out_image`` (batch, channels, height, width) in [-1, 1].
    Either ``noise`` or the sampling's ``seed`` is given. With ``out_denoised``, shaped as ``out_latents``, the clean
    latents as predicted at each step are there before its ``StepDone``; the next step overwrites them.
    """

    components: Annotated[dict[Role, ComponentId], msgspec.Meta(max_length=8)]
    io: HostShmBlock
    conditioning: Arguments
    sampling: Sampling
    noise: IoTensor | None = None
    out_latents: IoTensor
    out_image: IoTensor | None = None
    out_denoised: IoTensor | None = None


class Decode(Request, tag="decode", frozen=True, kw_only=True):
    """Decode ``latents`` (batch, channels, h, w) to ``out``, uncut at [-1, 1]. Answered by ``Decoded``.

    Shapes are those of the component's facts. ``scaling`` is that of ``latents``; without it, that of the facts.
    """

    vae_id: ComponentId
    io: HostShmBlock
    latents: IoTensor
    out: IoTensor
    scaling: LatentScaling | None = None


class Encode(Request, tag="encode", frozen=True, kw_only=True):
    """Encode ``image``, channels first or last, in [-1, 1] to latents ``out``. Answered by ``Encoded``.

    The latents are the posterior's mode; shapes are those of the component's facts. ``scaling`` is that of ``out``;
    without it, that of the facts.
    """

    vae_id: ComponentId
    io: HostShmBlock
    image: IoTensor
    out: IoTensor
    scaling: LatentScaling | None = None


class EncodeText(Request, tag="encode_text", frozen=True, kw_only=True):
    """Encode ``token_ids`` (batch, tokens), int64, to ``out`` (batch, tokens, width). Answered by ``TextEncoded``.

    ``out`` is the last layer after the final norm. ``out_pooled`` (batch, width), of encoders that have one, is its
    state at the first end-of-text token, not projected. Tokenizers are the client's.
    """

    encoder_id: ComponentId
    io: HostShmBlock
    token_ids: IoTensor
    out: IoTensor
    out_pooled: IoTensor | None = None


class Cancel(Request, tag="cancel", frozen=True, kw_only=True):
    """Cancel an earlier request of this session. Answered by ``CancelNoted``.

    The job itself answers ``Failed(cancelled)``.
    """

    target_request_id: RequestId


class GetStatus(Request, tag="get_status", frozen=True, kw_only=True):
    """Answered by ``Status``."""


class GetLogs(Request, tag="get_logs", frozen=True, kw_only=True):
    """Ask for recent log lines from number ``after_line`` on. Answered by ``LogLines``."""

    after_line: Count = 0


class Stop(Request, tag="stop", frozen=True, kw_only=True):
    """Shut the daemon down. Answered by ``Stopping`` before it happens."""


InferenceRequest = Call | Generate | Decode | Encode | EncodeText
"""Requests that run on the workers and are queued."""

AnyRequest = (
    Hello
    | Beat
    | Goodbye
    | CheckMemory
    | Lend
    | ReturnLoan
    | Adopt
    | Revoke
    | Call
    | Generate
    | Decode
    | Encode
    | EncodeText
    | Cancel
    | GetStatus
    | GetLogs
    | Stop
)
