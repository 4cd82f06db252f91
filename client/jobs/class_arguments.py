"""Convert the arguments of modules that run as their class: any value that it takes, also objects of diffusers."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from msgspec.structs import replace

from xditd.client.io_places import DevicePlaces, IoPlaces
from xditd.client.jobs.arguments import ArgumentWriter, KeptTensor, check_memory
from xditd.client.jobs.held_tensors import HeldTensor, HeldView
from xditd.ipc import limits
from xditd.ipc.arguments import Argument, Held, InIo, Kept, ObjectOf, Opaque, PairsOf, SetOf, Values
from xditd.ipc.errors import BadRequest
from xditd.ipc.module_state import DEVICE, GENERATOR, STATE
from xditd.ipc.transports.module_walk import class_name, describe_class, describe_constant, is_describable
from xditd.ipc.transports.tensor_views import dtype_name, inverse_order, memory_order


class ClassArgumentWriter(ArgumentWriter):
    """Converts what :class:`ArgumentWriter` does, and also numbers that are not finite, sets, maps with any keys,
    dtypes, devices, enumerations, classes, generators, and objects of diffusers and transformers.

    Tensors keep the order of their dimensions in memory, since some kernels round differently in another order. With
    ``is_on_gpu``, the module's parameters are on a GPU: CPU tensors are marked, and stay on the CPU.
    """

    def __init__(
        self,
        io_places: IoPlaces,
        is_kept: Callable[[KeptTensor], bool] = lambda _: False,
        *,
        device_places: DevicePlaces | None = None,
        is_on_gpu: bool = False,
    ) -> None:
        super().__init__(io_places, is_kept, device_places=device_places)
        self._is_on_gpu = is_on_gpu

    def _write(self, path: str, value: Any, depth: int) -> Argument:
        if isinstance(value, HeldTensor):
            return value.held
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            return self._pairs(path, value, depth)
        if isinstance(value, float) and not math.isfinite(value):
            return describe_constant(value)
        if isinstance(value, torch.Generator):
            return self._generator(path, value)
        if isinstance(value, (set, frozenset)):
            return SetOf(items=tuple(self._write(path, each, depth + 1) for each in sorted(value, key=repr)))
        if isinstance(value, (torch.dtype, torch.device, enum.Enum, type)):
            return self._constant(path, value)
        if not isinstance(value, (torch.Tensor, torch.nn.Module)) and is_describable(value):
            return self._object(path, value, depth)
        return super()._write(path, value, depth)

    def _generator(self, path: str, generator: torch.Generator) -> ObjectOf:
        """Describe a random number generator by its state, which comes back with the results."""
        attributes: dict[str, Argument] = {
            DEVICE: generator.device.type,
            STATE: self._write_tensor(f"{path}.state", generator.get_state()),
        }
        return ObjectOf(class_name=GENERATOR, attributes=attributes)

    def _constant(self, path: str, value: object) -> Argument:
        found = describe_class(value) if isinstance(value, type) else describe_constant(value)
        if isinstance(found, Opaque):
            raise BadRequest(f"{path}: {found.text} cannot be sent to the workers")
        return found

    def _pairs(self, path: str, value: Mapping[Any, Any], depth: int) -> PairsOf:
        self._check_depth(path, depth)
        return PairsOf(
            items=tuple(
                (self._constant(f"{path}: key", key), self._write(f"{path}[{key!r}]", each, depth + 1))
                for key, each in value.items()
            )
        )

    def _object(self, path: str, value: object, depth: int) -> ObjectOf:
        self._check_depth(path, depth)
        self._count += 1
        attributes = {name: self._write(f"{path}.{name}", each, depth + 1) for name, each in vars(value).items()}
        return ObjectOf(class_name=class_name(type(value)), attributes=attributes)

    def _check_depth(self, path: str, depth: int) -> None:
        if depth >= limits.MAX_ARGUMENT_DEPTH:
            raise BadRequest(f"{path}: arguments may be nested {limits.MAX_ARGUMENT_DEPTH} levels deep at most")

    def _write_tensor(self, path: str, value: Any) -> Values | InIo | Kept | Held:  # type: ignore[override]
        if isinstance(value, HeldTensor):
            return value.held
        if isinstance(value, HeldView):
            value = value.read()
        if not isinstance(value, torch.Tensor):
            return super()._write_tensor(path, value)
        if value.requires_grad and torch.is_grad_enabled():
            raise BadRequest(f"{path}: it requires a gradient, and workers compute none: call under torch.no_grad()")
        check_memory(path, value)
        dtype = dtype_name(value.dtype, path)  # raises UnsupportedDtype with the path
        on_host = self._is_on_gpu and value.device.type == "cpu"
        if value.device.type == "cpu" and value.numel() <= self._max_values and not value.is_complex():
            values = value.detach().flatten().tolist()
            if all(map(math.isfinite, values)):
                self._note_device(value.device)
                return Values(dtype=dtype, shape=tuple(value.shape), values=tuple(values), on_host=on_host)
        self._note_device(value.device)
        in_memory = memory_order(value)
        leaf = self._place(value if in_memory is None else value.permute(in_memory))
        order = None if in_memory is None else inverse_order(in_memory)
        return leaf if order is None and not on_host else replace(leaf, order=order, on_host=on_host)
