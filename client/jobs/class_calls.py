"""Run methods of modules that run as their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xditd.client.io_places import DevicePlaces, IoPlaces
from xditd.client.jobs.arguments import KeptTensor, result_room
from xditd.client.jobs.class_arguments import ClassArgumentWriter
from xditd.client.jobs.device_use import Room
from xditd.client.jobs.job_requests import CallRequest, Component, JobRequest, room_for_results
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import Call, Numerics, Part, ReadTensors
from xditd.ipc.tensors import ITEM_BYTES, HostShmBlock


def class_call_request(
    component: Component,
    parts: Sequence[Mapping[str, Any]],
    method: str,
    numerics: Numerics | None,
    device: torch.device | None,
    is_kept: Callable[[KeptTensor], bool],
    room: Room,
) -> CallRequest:
    """Build a request for one call of ``method`` for each of ``parts``.

    ``device`` is that of the caller's module, to which results go; ``None`` is that of the first tensor given.
    """
    if not 1 <= len(parts) <= limits.MAX_PARTS:
        raise BadRequest(f"parts: {len(parts)} sets of arguments; give from 1 to {limits.MAX_PARTS}")
    places, device_places = IoPlaces(), DevicePlaces()
    writer = ClassArgumentWriter(places, is_kept, device_places=device_places if room.is_on_device else None)
    writer.is_on_gpu = device is not None and device.type == "cuda"
    written: list[Part] = []
    devices: list[torch.device] = []
    for number, arguments in enumerate(parts):
        if not isinstance(arguments, Mapping):
            raise BadRequest(f"arguments: a dict by name is needed, not {type(arguments).__name__}")
        written.append(Part(arguments=writer.write(arguments, f"parts[{number}]." if len(parts) > 1 else "")))
        devices.append(device or writer.device or torch.device("cpu"))
    item_bytes = ITEM_BYTES[component.facts.dtype]
    # Most results have the shape of the first argument. If they are larger, workers answer with a block of their own.
    samples = [next(iter(arguments.values()), None) for arguments in parts]
    guess_bytes = sum(result_room(sample, item_bytes) for sample in samples)
    at, size_bytes, device_at, device_size_bytes = room_for_results(
        places, device_places, room, guess_bytes, devices[0]
    )

    def write(request_id: str, io: HostShmBlock) -> Call:
        return Call(
            request_id=request_id,
            component_id=component.component_id,
            io=io,
            parts=tuple(written),
            method=method,
            numerics=numerics,
            out_offset_bytes=at,
            out_size_bytes=size_bytes,
            device_out_offset_bytes=device_at,
            device_out_size_bytes=device_size_bytes,
        )

    return CallRequest(
        places,
        writer.inputs,
        {},
        devices[0],
        write,
        devices,
        writer.kept,
        device_places,
        writer.device_inputs,
        device_size_bytes,
    )


def read_tensor_request(name: str, tensor: torch.Tensor, component_id: str | None = None) -> JobRequest:
    """Build the request to copy a tensor to ``value``: a held one by id, or one of a component by name."""
    places = IoPlaces()
    out = places.add_output(tensor.dtype, tuple(tensor.shape))

    def write(request_id: str, io: HostShmBlock) -> ReadTensors:
        return ReadTensors(request_id=request_id, component_id=component_id, io=io, places={name: out})

    return JobRequest(places, [], {"value": out}, tensor.device, write)


def release_request(held_ids: tuple[str, ...]) -> JobRequest:
    """Build the request to free held tensors."""

    def write(request_id: str, io: HostShmBlock) -> ReadTensors:
        return ReadTensors(request_id=request_id, io=io, places={}, released=held_ids)

    return JobRequest(IoPlaces(), [], {}, torch.device("cpu"), write)
