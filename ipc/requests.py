"""What a client may ask of the daemon: the closed union :data:`AnyRequest`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.protocol import ComponentId, Request, RequestId
from xditd.ipc.tensors import Bytes, CopiedBytes, Count, Described, HostShmBlock, IoTensor, Manifest, Name

Side = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE_PIXELS)]
Unit = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Guidance = Annotated[float, msgspec.Meta(ge=0.0, le=limits.MAX_GUIDANCE)]

Variant = Literal["class", "float32_time"]
"""Whose rounding a transformer in half precision follows; in float32 both give the same bits.

``class``: diffusers' model class and pipeline, which round the timestep to the weights' dtype, and the latents between
two steps. ``float32_time``: ComfyUI, where the timestep stays float32 until it is embedded, and latents between steps.
"""


class Hello(Request, tag="hello", frozen=True, kw_only=True):
    """Open a session. Nothing else is served before it. Answered by ``Welcome``."""

    protocol_version: Count
    package_version: Name
    client_name: Name


class Beat(Request, tag="beat", frozen=True, kw_only=True):
    """A sign of life, sent every ``Welcome.beat_every_s``: a session that is silent ends. Answered by ``BeatHeard``."""


class Goodbye(Request, tag="goodbye", frozen=True, kw_only=True):
    """Close the session and end its loans. Answered by ``Farewell``; a dead process needs no goodbye."""


class CheckCanary(Request, tag="check_canary", frozen=True, kw_only=True):
    """Ask every worker what it reads in a stretch of the client's I/O block. Answered by ``CanarySeen``."""

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


class Generate(Request, tag="generate", frozen=True, kw_only=True):
    """Run the whole denoising loop in the workers. Events ``Queued``, ``StepDone``; reply ``Generated``.

    All tensors lie in ``io``. Shapes: ``prompt_embeds`` (batch, text tokens, context),
    ``pooled_prompt_embeds`` (batch, pooled), ``noise`` and ``out_latents`` (batch, 16, height/8,
    width/8), ``out_image`` (batch, 3, height, width) in [-1, 1], decoded by ``vae_id``.
    ``sigmas`` has ``steps`` descending values in (0, 1], used verbatim; the final 0 is implied, as
    in diffusers. Without it, the family's own schedule runs. With ``out_denoised``, shaped as ``out_latents``, the
    clean latents as predicted at each step are there before its ``StepDone``; the next step overwrites them.
    With a ``step_cache_threshold`` above 0, a step whose first block changes the image by less than that, relative to
    what it did at the last step that was computed, takes over what all other blocks did there: not lossless.
    ``variant`` says what is rounded: see :data:`Variant`.
    """

    transformer_id: ComponentId
    vae_id: ComponentId | None = None
    io: HostShmBlock
    prompt_embeds: IoTensor
    pooled_prompt_embeds: IoTensor
    noise: IoTensor | None = None
    seed: Count | None = None
    height: Side
    width: Side
    steps: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_STEPS)]
    sigmas: Annotated[tuple[Unit, ...], msgspec.Meta(max_length=limits.MAX_STEPS)] | None = None
    guidance_scale: Guidance = 3.5
    out_latents: IoTensor
    out_image: IoTensor | None = None
    out_denoised: IoTensor | None = None
    step_cache_threshold: Unit = 0.0
    variant: Variant = "class"


class Part(Described, frozen=True, kw_only=True):
    """The text conditioning of ``rows`` images of a batch.

    ``prompt_embeds`` is (1 or rows, text tokens, context), ``pooled_prompt_embeds`` (1 or rows, pooled); one row
    serves all. With a ``conditioning_id`` the workers keep both for the client, and a later part may leave them out.
    ``guidance`` is for guidance-distilled checkpoints.
    """

    rows: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_BATCH)]
    conditioning_id: Name | None = None
    prompt_embeds: IoTensor | None = None
    pooled_prompt_embeds: IoTensor | None = None
    guidance: Guidance | None = None


class Denoise(Request, tag="denoise", frozen=True, kw_only=True):
    """Run the transformer once for every image of a batch. Answered by ``Denoised``.

    ``latents`` and ``out`` are (batch, 16, height/8, width/8); ``timestep`` holds one sigma in
    [0, 1] for each image. ``parts`` share the batch out in order. Neighbours with as many text tokens run together
    in one forward; others one after the other, since padding would change the result. ``sigmas`` are those of forwards
    to come, if the client knows them; they change no bit of the result. ``variant`` says what is rounded: see
    :data:`Variant`.
    """

    transformer_id: ComponentId
    io: HostShmBlock
    latents: IoTensor
    timestep: Annotated[tuple[Unit, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_BATCH)]
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_BATCH)]
    sigmas: Annotated[tuple[Unit, ...], msgspec.Meta(max_length=limits.MAX_STEPS)] = ()
    variant: Variant = "class"
    out: IoTensor


class Decode(Request, tag="decode", frozen=True, kw_only=True):
    """Decode ``latents`` (batch, 16, h, w) to ``out`` (batch, 3, 8h, 8w), uncut at [-1, 1]. Answered by ``Decoded``."""

    vae_id: ComponentId
    io: HostShmBlock
    latents: IoTensor
    out: IoTensor


class Encode(Request, tag="encode", frozen=True, kw_only=True):
    """Encode ``image`` (batch, 3, 8h, 8w) or (batch, 8h, 8w, 3) in [-1, 1] to ``out`` (batch, 16, h, w).

    The latents are the posterior's mode. Answered by ``Encoded``.
    """

    vae_id: ComponentId
    io: HostShmBlock
    image: IoTensor
    out: IoTensor


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


Job = Generate | Denoise | Decode | Encode | EncodeText
"""Requests that run on the workers and are queued."""

AnyRequest = (
    Hello
    | Beat
    | Goodbye
    | CheckCanary
    | Lend
    | ReturnLoan
    | Adopt
    | Revoke
    | Generate
    | Denoise
    | Decode
    | Encode
    | EncodeText
    | Cancel
    | GetStatus
    | GetLogs
    | Stop
)
