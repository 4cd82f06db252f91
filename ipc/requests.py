"""Requests of a client to the daemon: the closed union :data:`AnyRequest`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Arguments, Finite, Whole
from xditd.ipc.facts import LatentScaling
from xditd.ipc.field_types import Bytes, Count, Name
from xditd.ipc.job_parts import Control, LoraUses, Numerics, Part, Sampling
from xditd.ipc.outlines import Outline
from xditd.ipc.protocol import ComponentId, Request, RequestId
from xditd.ipc.tensors import CopiedBytes, CudaIpcBlock, Digest, HostShmBlock, IoTensor, Manifest, TensorNames

HeldId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
HeldIds = Annotated[tuple[HeldId, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]
Role = Literal["transformer", "transformer_2", "vae"]
"""The role of a component in a generation."""


class Hello(Request, tag="hello", frozen=True, kw_only=True):
    """Open a session; no other request is served before it. Answered by ``Welcome``."""

    protocol_version: Count
    package_version: Name
    client_name: Name


class Beat(Request, tag="beat", frozen=True, kw_only=True):
    """Heartbeat, sent every ``Welcome.beat_every_s``: a silent session is ended. Answered by ``BeatHeard``."""


class Goodbye(Request, tag="goodbye", frozen=True, kw_only=True):
    """Close the session and end its loans, as the exit of the process does. Answered by ``Farewell``."""


class CheckMemory(Request, tag="check_memory", frozen=True, kw_only=True):
    """Have every worker hash part of the client's I/O block (memory check). Answered by ``MemoryChecked``."""

    io: HostShmBlock
    offset_bytes: Bytes
    length_bytes: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class Lend(Request, tag="lend", frozen=True, kw_only=True):
    """Lend a component to the workers until ``ReturnLoan``, ``Goodbye`` or the client's exit.

    Answered by ``Lent`` once every rank has mapped, verified and plugged it. ``copied`` is what the client copied to
    make the tensors lendable, for the daemon's totals. ``changed`` are the tensors that were written since the
    generation before; without it, any may have been.
    """

    manifest: Manifest
    copied: CopiedBytes = CopiedBytes()
    changed: TensorNames | None = None


class Announce(Request, tag="announce", frozen=True, kw_only=True):
    """Announce a component that will be lent. Answered by ``Announced`` at once.

    Idle workers build its model, without weights. No lend has to follow; errors are those of the lend.
    """

    outline: Outline


class ReturnLoan(Request, tag="return_loan", frozen=True, kw_only=True):
    """Return a component to its owner. Answered by ``Returned`` once no worker maps it any more."""

    component_id: ComponentId


class Adopt(Request, tag="adopt", frozen=True, kw_only=True):
    """Have the workers copy a lent component, so that it outlives its client.

    Answered by ``Adopted`` once no worker maps the client's memory any more. ``Revoke`` frees the copy.
    """

    component_id: ComponentId


class Revoke(Request, tag="revoke", frozen=True, kw_only=True):
    """End any client's loan, or free an adopted component. Its jobs fail with ``lease_lost``.

    Answered by ``Revoked`` once no worker maps or holds the component.
    """

    component_id: ComponentId


class Call(Request, tag="call", frozen=True, kw_only=True):
    """Run a transformer's ``forward`` once for each part. Answered by ``Called``.

    Nothing is merged, padded or cast: a part returns what the class returns in the client's own process. Parts are
    independent, and may run on different ranks. ``foreseen`` announces values of an argument in later calls, in its
    units; it does not change results. ``variant`` is ``class``, or another one of the component's facts. ``out`` is the
    place for results in ``io``; longer ones are returned in a block of the workers.

    ``device_io`` is a block of the client's device memory for large tensors. ``device_out`` is the place in it for
    results of at least :data:`~xditd.ipc.limits.DEVICE_IO_FROM_BYTES` each, if rank 0 can write to that GPU. Its
    fingerprint is of bytes that never change and differ for each block: workers keep it mapped, and unmap those whose
    digests are in ``dropped_device_io`` before the forward.
    """

    component_id: ComponentId
    io: HostShmBlock
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_PARTS)]
    foreseen: Annotated[
        dict[Name, Annotated[tuple[Finite, ...], msgspec.Meta(max_length=limits.MAX_STEPS)]],
        msgspec.Meta(max_length=limits.MAX_FORESEEN),
    ] = msgspec.field(default_factory=dict)
    variant: Name = "class"
    method: Name = "forward"
    """Another method than ``forward``, such as a VAE's ``decode``; modules that run as their class have them."""
    numerics: Numerics | None = None
    """For modules that run as their class; without it, torch's defaults."""
    loras: LoraUses = ()
    """Of the transformer, for this call alone."""
    out_offset_bytes: Bytes
    out_size_bytes: Bytes
    device_io: CudaIpcBlock | None = None
    device_out_offset_bytes: Bytes = 0
    device_out_size_bytes: Bytes = 0
    dropped_device_io: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=limits.MAX_DROPPED_BLOCKS)] = ()


class ReadTensors(Request, tag="read_tensors", frozen=True, kw_only=True):
    """Copy tensors that the workers hold into ``io``, each to its place. Answered by ``TensorsRead``.

    They are held tensors by id or, with a ``component_id``, those of that component by name.
    """

    component_id: ComponentId | None = None
    io: HostShmBlock
    places: Annotated[dict[Name, IoTensor], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]
    released: HeldIds = ()
    """Held tensors to free, after the copies."""


class Generate(Request, tag="generate", frozen=True, kw_only=True):
    """Run the whole denoising loop in the workers. Events ``Queued``, ``StepDone``; reply ``Generated``.

    ``components`` are named by role: a ``transformer``, a ``transformer_2`` for low noise where the facts have two
    stages, and a ``vae`` if ``out_image`` or a picture is given. ``conditioning`` has
    the names of the transformer's facts. All tensors are in ``io`` or are kept. Shapes: ``noise`` and ``out_latents``
    as the facts' latents, ``out_image`` (batch, channels, height, width) in [-1, 1]. Either ``noise`` or the sampling's
    ``seed`` is given. ``out_denoised``, shaped as ``out_latents``, receives the predicted clean latents of each step
    before its ``StepDone``; the next step overwrites them.
    ``out_preview`` (batch, channels, height, width) likewise receives an image that the VAE decodes from these latents
    to [-1, 1]; of a video it is the middle frame.
    ``start_image`` (batch or 1, channels, height, width) in [-1, 1], which the VAE encodes, is where steps start from,
    by the sampling's ``strength``. ``start_mask`` (batch or 1, 1, height, width) is 1 where it is made anew and 0 where
    it is kept: latents are set to those of the image there after each step.
    """

    components: Annotated[dict[Role, ComponentId], msgspec.Meta(max_length=8)]
    loras: Annotated[dict[Role, LoraUses], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=dict)
    """LoRAs of the transformers, for this job alone."""
    controls: Annotated[tuple[Control, ...], msgspec.Meta(max_length=limits.MAX_CONTROLS)] = ()
    """ControlNets of the transformer, whose residuals are added up in this order."""
    io: HostShmBlock
    conditioning: Arguments
    sampling: Sampling
    noise: IoTensor | None = None
    out_latents: IoTensor
    out_image: IoTensor | None = None
    out_denoised: IoTensor | None = None
    out_preview: IoTensor | None = None
    start_image: IoTensor | None = None
    start_mask: IoTensor | None = None


class Decode(Request, tag="decode", frozen=True, kw_only=True):
    """Decode ``latents`` (batch, channels, h, w) to ``out``, not clamped to [-1, 1]. Answered by ``Decoded``.

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


Layer = Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_LAYER)]


class EncodeText(Request, tag="encode_text", frozen=True, kw_only=True):
    """Encode ``token_ids`` (batch, tokens), int64, to ``out`` (batch, tokens, width). Answered by ``TextEncoded``.

    ``out`` is the last layer after the final norm; with ``layers`` the states after each of these layers (0: the
    embeddings), one beside the other, (batch, tokens, layers * width). ``out_pooled`` (batch, width), for encoders that
    have one, is its state at the first end-of-text token, not projected. ``mask`` (batch, tokens), int64, is 0 for
    padding. ``images`` are those of the encoder's facts, of all texts of the batch in order. The client tokenizes.
    """

    encoder_id: ComponentId
    loras: LoraUses = ()
    """Of the encoder, for this job alone."""
    io: HostShmBlock
    token_ids: IoTensor
    mask: IoTensor | None = None
    layers: Annotated[tuple[Layer, ...], msgspec.Meta(max_length=limits.MAX_TEXT_LAYERS)] = ()
    images: Annotated[dict[Name, IoTensor], msgspec.Meta(max_length=limits.MAX_IMAGE_ARGUMENTS)] = msgspec.field(
        default_factory=dict
    )
    out: IoTensor
    out_pooled: IoTensor | None = None


Prompts = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=limits.MAX_PROMPT_CHARS)], ...],
    msgspec.Meta(max_length=limits.MAX_BATCH),
]
ByRole = Annotated[dict[Name, ComponentId], msgspec.Meta(max_length=limits.MAX_ROLES)]


class EncodePrompt(Request, tag="encode_prompt", frozen=True, kw_only=True):
    """Encode prompts to the conditioning that ``Generate`` takes of them. Answered by ``PromptEncoded``.

    ``encoders`` and ``tokenizers`` are named by the roles in the transformer's facts. Lengths, padding, templates and
    layers are those of the transformer's family. ``negative_prompts`` are as many as ``prompts``, or none, and so are
    ``prompts_2``, which the second encoder of a family reads in place of ``prompts``. ``images``
    (height, width, 3), uint8, go with every prompt. Without ``encoders``, the reply has the token ids alone.
    ``out`` is the place for results in ``io``; longer ones are returned in a block of the workers.
    """

    transformer_id: ComponentId
    encoders: ByRole
    tokenizers: ByRole
    loras: Annotated[dict[Name, LoraUses], msgspec.Meta(max_length=limits.MAX_ROLES)] = msgspec.field(
        default_factory=dict
    )
    """LoRAs of the encoders by role, for this job alone."""
    io: HostShmBlock
    prompts: Prompts
    negative_prompts: Prompts = ()
    prompts_2: Prompts = ()
    images: Annotated[tuple[IoTensor, ...], msgspec.Meta(max_length=limits.MAX_PROMPT_IMAGES)] = ()
    options: Annotated[dict[Name, bool | Whole | Finite], msgspec.Meta(max_length=64)] = msgspec.field(
        default_factory=dict
    )
    out_offset_bytes: Bytes
    out_size_bytes: Bytes


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


InferenceRequest = Call | ReadTensors | Generate | Decode | Encode | EncodeText | EncodePrompt
"""Requests that run on the workers as queued jobs."""

AnyRequest = (
    Hello
    | Beat
    | Goodbye
    | CheckMemory
    | Announce
    | Lend
    | ReturnLoan
    | Adopt
    | Revoke
    | Call
    | ReadTensors
    | Generate
    | Decode
    | Encode
    | EncodeText
    | EncodePrompt
    | Cancel
    | GetStatus
    | GetLogs
    | Stop
)
