"""``Call``, ``ReadTensors``, ``Generate``, ``Decode``, ``Encode``, ``EncodeText``, ``EncodePrompt``: jobs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

from xditd.daemon.front.service import Service
from xditd.daemon.queue.commands import Script, expect, slowest_ms
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc import arguments
from xditd.ipc.arguments import InIo, Values
from xditd.ipc.errors import BadRequest, Internal, LeaseLost
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.name_lists import listed
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Called, Decoded, Encoded, Generated, PromptEncoded, TensorsRead, TextEncoded
from xditd.ipc.requests import (
    Call,
    Decode,
    Encode,
    EncodePrompt,
    EncodeText,
    Generate,
    InferenceRequest,
    ReadTensors,
    Role,
)
from xditd.ipc.tensors import ComponentKind, IoTensor
from xditd.ipc.worker_messages import Done, Run

_REPLY: Final[dict[type[InferenceRequest], type[Decoded | Encoded | TextEncoded | TensorsRead]]] = {
    Decode: Decoded,
    Encode: Encoded,
    EncodeText: TextEncoded,
    ReadTensors: TensorsRead,
}
_KINDS: Final[dict[Role, ComponentKind]] = {
    "transformer": ComponentKind.TRANSFORMER,
    "transformer_2": ComponentKind.TRANSFORMER,
    "vae": ComponentKind.VAE,
}
"""The kind of component that a generation needs in each role."""


def run(service: Service, session: Session, request: InferenceRequest) -> None:
    """Check a request and queue its job.

    Raises:
        BadRequest: a component is of the wrong kind, a tensor lies outside the I/O block, or an argument tree is beyond
            the limits.
        Busy: the queue is full.
        LimitExceeded: the client's I/O blocks are larger than one client's may be.
        UnknownComponent: a component is not on loan.
    """
    component_ids = _check_components(service, request)
    _check_tensors(request)
    device_io = request.device_io if isinstance(request, Call) else None
    service.quotas.check_io(service.scheduler.of_process(session.process), request.io, device_io)
    session.has_io = True
    session.has_device_io = session.has_device_io or device_io is not None

    def work(_: Job) -> Script[Reply]:
        for component_id in component_ids:
            if not service.lending.leases.live(component_id).is_usable:
                raise LeaseLost(f"component {component_id}: no longer mapped when the job started")
        done = expect((yield lambda number: Run(op_number=number, job=request, exporter=session.process)), Done)
        return _reply(request, done)

    service.scheduler.submit(Job(session, request, work, component_ids))


def _reply(request: InferenceRequest, done: list[Done]) -> Reply:
    """Build the reply from all ranks' answers. Only rank 0 has a call's results; ``reused_steps`` is equal on all."""
    request_id = request.request_id
    timings_ms = slowest_ms([answer.timings_ms for answer in done])
    if isinstance(request, Generate):
        return Generated(request_id=request_id, timings_ms=timings_ms, reused_steps=done[0].reused_steps)
    if isinstance(request, (Call, EncodePrompt)):
        found = done[0].results
        if found is None:
            raise Internal(f"rank 0 ran request {request_id}, but its answer has no results")
        if isinstance(request, EncodePrompt):
            return PromptEncoded(
                request_id=request_id,
                results=found.trees[0],
                cut=done[0].cut,
                block=found.block,
                provider=found.provider,
                timings_ms=timings_ms,
            )
        return Called(
            request_id=request_id,
            results=found.trees,
            changed=found.changed,
            block=found.block,
            provider=found.provider,
            timings_ms=timings_ms,
        )
    return _REPLY[type(request)](request_id=request_id, timings_ms=timings_ms)


def _check_components(service: Service, request: InferenceRequest) -> tuple[str, ...]:
    wanted = _components_of(request)
    for component_id, kind in wanted:
        found = service.lending.leases.live(component_id).kind
        runs_as_class = (
            isinstance(request, Call) and found is ComponentKind.MODULE and kind is ComponentKind.TRANSFORMER
        )
        if found is not kind and not runs_as_class:
            what = "not mapped yet, and" if found is None else f"a {found.value} where"
            raise BadRequest(f"component {component_id}: {what} a {kind.value} is needed")
    return tuple(dict.fromkeys(component_id for component_id, _ in wanted))


def _components_of(request: InferenceRequest) -> list[tuple[str, ComponentKind]]:
    """List the components that a job names, each with the kind that the job needs."""
    if isinstance(request, Call):
        controls = [(each.component_id, ComponentKind.CONTROLNET) for part in request.parts for each in part.controls]
        return [(request.component_id, ComponentKind.TRANSFORMER), *controls, *_loras_of(request.loras)]
    if isinstance(request, Generate):
        if "transformer" not in request.components:
            raise BadRequest("components: a transformer is required; name one")
        named = [(component_id, _KINDS[role]) for role, component_id in request.components.items()]
        for role, uses in request.loras.items():
            if _KINDS[role] is not ComponentKind.TRANSFORMER:
                raise BadRequest(f"loras: of the {role}: a generation takes LoRAs of its transformers alone")
            named += _loras_of(uses, request.sampling.steps)
        return [*named, *((each.component_id, ComponentKind.CONTROLNET) for each in request.controls)]
    if isinstance(request, EncodeText):
        return [(request.encoder_id, ComponentKind.TEXT_ENCODER), *_loras_of(request.loras)]
    if isinstance(request, EncodePrompt):
        if unknown := sorted(set(request.loras) - set(request.encoders)):
            raise BadRequest(f"loras: of {listed(unknown)}, which is no role among the encoders")
        return [
            (request.transformer_id, ComponentKind.TRANSFORMER),
            *((each, ComponentKind.TEXT_ENCODER) for each in request.encoders.values()),
            *((each, ComponentKind.TOKENIZER) for each in request.tokenizers.values()),
            *(found for uses in request.loras.values() for found in _loras_of(uses)),
        ]
    if isinstance(request, ReadTensors):
        return [] if request.component_id is None else [(request.component_id, ComponentKind.MODULE)]
    return [(request.vae_id, ComponentKind.VAE)]


def _loras_of(uses: Iterable[LoraUse], steps: int = 0) -> list[tuple[str, ComponentKind]]:
    """List the LoRAs of a component, after a check of the steps from which on they have other strengths."""
    found = []
    for use in uses:
        later = [each.step for each in use.later]
        if later and not steps:
            raise BadRequest(f"loras: {use.component_id} has strengths by step: only a generation has steps")
        if later != sorted(set(later)) or (later and later[-1] >= steps):
            raise BadRequest(
                f"loras: the strengths of {use.component_id} change at the steps {listed(later)}: ascending ones below "
                f"{steps} are needed"
            )
        found.append((use.component_id, ComponentKind.LORA))
    return found


def _check_tensors(request: InferenceRequest) -> None:
    """Refuse tensors that lie outside the I/O block, or whose values do not match their shape."""
    size_bytes = request.io.size_bytes
    # Not msgspec.structs.fields: it resolves the types again each time, which took 0.3 ms of every step.
    for name in request.__struct_fields__:
        value = getattr(request, name)
        if isinstance(value, IoTensor):
            _check_end(name, value.offset_bytes + value.size_bytes, size_bytes)
    if isinstance(request, Generate):
        for number, control in enumerate(request.controls):
            for part, place in (("image", control.image), ("latents", control.latents)):
                if place is not None:
                    _check_end(f"controls[{number}].{part}", place.offset_bytes + place.size_bytes, size_bytes)
    if isinstance(request, ReadTensors):
        for held_id, place in request.places.items():
            _check_end(held_id, place.offset_bytes + place.size_bytes, size_bytes)
    if isinstance(request, EncodeText):
        for name, place in request.images.items():
            _check_end(f"images.{name}", place.offset_bytes + place.size_bytes, size_bytes)
    if isinstance(request, EncodePrompt):
        for number, place in enumerate(request.images):
            _check_end(f"images[{number}]", place.offset_bytes + place.size_bytes, size_bytes)
    if isinstance(request, (Call, EncodePrompt)):
        _check_end("out", request.out_offset_bytes + request.out_size_bytes, size_bytes)
    if isinstance(request, Call):
        _check_device_end("device_out", request.device_out_offset_bytes + request.device_out_size_bytes, request)
    try:
        for where, tree in _trees_of(request):
            for path, tensor in arguments.tensors(tree):
                if isinstance(tensor, InIo) and tensor.in_device_io:
                    _check_device_end(f"{where}{path}", tensor.offset_bytes + tensor.place.size_bytes, request)
                elif isinstance(tensor, InIo):
                    _check_end(f"{where}{path}", tensor.offset_bytes + tensor.place.size_bytes, size_bytes)
                elif isinstance(tensor, Values) and len(tensor.values) != math.prod(tensor.shape):
                    raise BadRequest(f"{where}{path}: {len(tensor.values)} values for the shape {list(tensor.shape)}")
    except ValueError as error:
        raise BadRequest(f"{where}{error}") from None


def _trees_of(request: InferenceRequest) -> Iterator[tuple[str, dict[str, arguments.Argument]]]:
    if isinstance(request, Call):
        for number, part in enumerate(request.parts):
            yield f"parts[{number}].", part.arguments
            for index, control in enumerate(part.controls):
                yield f"parts[{number}].controls[{index}].", control.arguments
    elif isinstance(request, Generate):
        yield "conditioning.", request.conditioning


def _check_end(name: str, end_bytes: int, size_bytes: int) -> None:
    if end_bytes > size_bytes:
        raise BadRequest(f"{name} ends at byte {end_bytes} of an I/O block of {size_bytes}")


def _check_device_end(name: str, end_bytes: int, request: InferenceRequest) -> None:
    block = request.device_io if isinstance(request, Call) else None
    if block is None:
        if end_bytes:
            raise BadRequest(f"{name} is in device memory, but the request describes no block of it (device_io)")
    elif end_bytes > block.size_bytes:
        raise BadRequest(f"{name} ends at byte {end_bytes} of a block of device memory of {block.size_bytes}")
