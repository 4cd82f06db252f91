"""Run methods of modules that run as their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xditd.client.io_places import DevicePlaces, IoPlaces
from xditd.client.jobs.arguments import KeptTensor
from xditd.client.jobs.class_arguments import ClassArgumentWriter
from xditd.client.jobs.component import Component
from xditd.client.jobs.device_use import Room
from xditd.client.jobs.job_requests import CallRequest, JobRequest, check_parts, write_call
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import Numerics
from xditd.ipc.requests import ReadTensors
from xditd.ipc.tensors import HostShmBlock


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

    Raises:
        BadRequest: ``method`` is no text, or a part cannot be sent.
    """
    if not isinstance(method, str):
        raise BadRequest(f"method: {method!r:.100} is of type {type(method).__name__}, use a name such as 'forward'")
    check_parts(parts)
    places, device_places = IoPlaces(), DevicePlaces()
    writer = ClassArgumentWriter(
        places,
        is_kept,
        device_places=device_places if room.is_on_device else None,
        is_on_gpu=device is not None and device.type == "cuda",
    )

    def sample_of(arguments: Mapping[str, Any]) -> Any:
        return next(iter(arguments.values()), None)

    return write_call(
        component,
        parts,
        writer,
        (places, device_places),
        room,
        sample_of,
        device=device,
        method=method,
        numerics=numerics,
    )


def read_tensor_request(name: str, tensor: torch.Tensor, component_id: str | None = None) -> JobRequest:
    """Build the request to copy a tensor to the output ``value``, with the dtype, shape and device of ``tensor``.

    ``name`` is that of a tensor of the component, or without a ``component_id`` the id of a held tensor.
    """
    places = IoPlaces()
    out = places.add_output(tensor.dtype, tuple(tensor.shape))

    def write(request_id: str, io: HostShmBlock) -> ReadTensors:
        return ReadTensors(request_id=request_id, component_id=component_id, io=io, places={name: out})

    return JobRequest(places, [], {"value": out}, tensor.device, write)


def release_request(held_ids: tuple[str, ...]) -> JobRequest:
    """Build the request to free held tensors in the workers."""

    def write(request_id: str, io: HostShmBlock) -> ReadTensors:
        return ReadTensors(request_id=request_id, io=io, places={}, released=held_ids)

    return JobRequest(IoPlaces(), [], {}, torch.device("cpu"), write)
