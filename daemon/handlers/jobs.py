"""``Generate``, ``Denoise``, ``Decode``, ``Encode`` and ``EncodeText``: the five kinds of work on the workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from xditd.daemon.jobs import Job
from xditd.daemon.sequence import Script, expect, slowest_ms
from xditd.daemon.service import Service
from xditd.daemon.sessions import Session
from xditd.ipc.errors import BadRequest, LeaseLost
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Decoded, Denoised, Encoded, Generated, TextEncoded
from xditd.ipc.requests import Decode, Denoise, Encode, EncodeText, Generate, Part
from xditd.ipc.requests import Job as JobRequest
from xditd.ipc.tensors import ComponentKind, IoTensor
from xditd.ipc.worker_messages import Done, Run

_REPLY: Final[dict[type[JobRequest], type[Denoised | Decoded | Encoded | TextEncoded]]] = {
    Denoise: Denoised,
    Decode: Decoded,
    Encode: Encoded,
    EncodeText: TextEncoded,
}


def run(service: Service, session: Session, request: JobRequest) -> None:
    """Queue the work.

    Raises:
        BadRequest: a component is of the wrong kind, or a tensor lies outside the I/O block.
        Busy: the queue is full.
        LimitExceeded: the client's I/O blocks are larger than one client's may be.
        UnknownComponent: a component is not on loan.
    """
    component_ids = _check_components(service, request)
    _check_io(request)
    service.quotas.check_io(service.desk.queue.of_process(session.process), request.io)
    session.has_io = True

    def work(_: Job) -> Script[Reply]:
        for component_id in component_ids:
            if not service.loans.registry.live(component_id).is_usable:
                raise LeaseLost(f"component {component_id}: no longer mapped when the job's turn came")
        done = expect((yield lambda number: Run(op_number=number, job=request, exporter=session.process)), Done)
        timings_ms = slowest_ms([answer.timings_ms for answer in done])
        if isinstance(request, Generate):  # whose steps are spared on every rank alike
            return Generated(request_id=request.request_id, timings_ms=timings_ms, reused_steps=done[0].reused_steps)
        return _REPLY[type(request)](request_id=request.request_id, timings_ms=timings_ms)

    service.submit(Job(session, request, work, component_ids))


def _check_components(service: Service, request: JobRequest) -> tuple[str, ...]:
    wanted: list[tuple[str, ComponentKind]] = []
    if isinstance(request, (Generate, Denoise)):
        wanted.append((request.transformer_id, ComponentKind.TRANSFORMER))
    if isinstance(request, (Generate, Decode, Encode)) and request.vae_id is not None:
        wanted.append((request.vae_id, ComponentKind.VAE))
    if isinstance(request, EncodeText):
        wanted.append((request.encoder_id, ComponentKind.TEXT_ENCODER))
    for component_id, kind in wanted:
        found = service.loans.registry.live(component_id).manifest.kind
        if found is not kind:
            raise BadRequest(f"component {component_id}: a {found.value} where a {kind.value} is needed")
    return tuple(component_id for component_id, _ in wanted)


def _check_io(request: JobRequest) -> None:
    for name, tensor in _io_tensors(request):
        end = tensor.offset_bytes + tensor.size_bytes
        if end > request.io.size_bytes:
            raise BadRequest(f"{name} ends at byte {end} of an I/O block of {request.io.size_bytes}")


def _io_tensors(described: JobRequest | Part) -> Iterator[tuple[str, IoTensor]]:
    # Not msgspec.structs.fields: it works out the types anew in every call, which took 0.3 ms of every step.
    for name in described.__struct_fields__:
        value = getattr(described, name)
        if isinstance(value, IoTensor):
            yield name, value
    if isinstance(described, Denoise):
        for part in described.parts:
            yield from _io_tensors(part)
