"""Read argument trees: from a message and an I/O block to the inputs of a forward."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.kept import KeptTensors
from xditd.gpu_workers.models.described_values import make_key, make_object, make_plain
from xditd.gpu_workers.models.finite import check_finite
from xditd.gpu_workers.models.operations import Inputs
from xditd.gpu_workers.parallel.client_blocks import OpenClientBlock
from xditd.ipc import limits
from xditd.ipc.arguments import (
    Argument,
    Held,
    InIo,
    Kept,
    ListOf,
    MapOf,
    ObjectOf,
    PairsOf,
    Rows,
    SetOf,
    Tensor,
    TupleOf,
    Values,
)
from xditd.ipc.errors import BadRequest, LimitExceeded, UnknownKept
from xditd.ipc.facts import ArgumentFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.transports.tensor_views import torch_dtype


class ArgumentReader:
    """Reads the arguments of one job, for one client, to one device.

    With ``held``, also those that only modules run as their class take: objects, numbers that are not finite, and the
    tensors that the workers hold.
    """

    def __init__(
        self,
        io: OpenIo,
        device: torch.device,
        kept: KeptTensors,
        client: ProcessIdentity,
        held: HeldTensors | None = None,
        device_io: OpenClientBlock | None = None,
    ) -> None:
        self._io = io
        self._held = held
        self._device_io = device_io
        self._device = device
        self._kept = kept
        self._client = client
        self._taken_bytes = 0
        self._unchecked: dict[str, torch.Tensor] = {}
        """By path: the tensors of this job that were not checked yet."""
        self._to_keep: dict[str, torch.Tensor] = {}

    def read(self, arguments: Mapping[str, Argument], where: str = "") -> Inputs:
        """Read every argument: tensors are copied to the device in their own dtype and shape.

        ``where`` is put before names in errors. Call :meth:`finish` when all are read.

        Raises:
            BadRequest: a tensor is outside its block, or the number of its values does not fit its shape.
            LimitExceeded: the job's arguments take more than :data:`~xditd.ipc.limits.MAX_ARGUMENT_BYTES`.
            UnknownKept: a kept tensor was evicted.
        """
        found = {name: self._value(where + name, node) for name, node in arguments.items()}
        known = {name: _host_values(found[name]) for name, node in arguments.items() if isinstance(node, Values)}
        for name in known:
            node = arguments[name]
            if not (isinstance(node, Values) and node.on_host):
                found[name] = self._on_device(found[name])
        return Inputs(found, known)

    def finish(self) -> None:
        """Check that all tensors are finite, with one wait for the device, and keep those with an id.

        Of a module that runs as its class they are not checked, and there is no wait: the client may write to its block
        again once the job has ended, however it ends.

        Raises:
            BadRequest: names an argument with other values.
        """
        if self._held is None:  # a module that runs as its class takes what the class takes, such as masks with -inf
            check_finite({path: tensor for path, tensor in self._unchecked.items() if tensor.is_floating_point()})
        if self._device_io is not None:
            self._device_io.drop_inputs()
        for kept_id, tensor in self._to_keep.items():
            self._kept.keep(self._client, kept_id, tensor)

    def _value(self, path: str, node: Argument) -> Any:
        if isinstance(node, Values):
            return _build_tensor(path, node)
        if isinstance(node, (InIo, Kept, Rows)):
            return self._tensor(path, node)
        if isinstance(node, ListOf):
            return [self._nested(f"{path}[{number}]", each) for number, each in enumerate(node.items)]
        if isinstance(node, TupleOf):
            return tuple(self._nested(f"{path}[{number}]", each) for number, each in enumerate(node.items))
        if isinstance(node, MapOf):
            return {key: self._nested(f"{path}.{key}", each) for key, each in node.items.items()}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        return self._class_value(path, node)

    def _class_value(self, path: str, node: Argument) -> Any:
        """Read a value that only a module run as its class takes."""
        if self._held is None:
            raise BadRequest(
                f"{path}: a {type(node).__name__} cannot be given to this model; give tensors, numbers and texts"
            )
        if isinstance(node, Held):
            return self._held.find(self._client, node.held_id, path)
        if isinstance(node, PairsOf):
            pairs = {make_key(key): self._nested(f"{path}[{key!r:.100}]", value) for key, value in node.items}
            if len(pairs) != len(node.items):
                raise BadRequest(f"{path}: two of its keys are the same key here, such as two devices of one kind")
            return pairs
        if isinstance(node, SetOf):
            return {make_key(each) for each in node.items}
        if isinstance(node, ObjectOf):
            found = {name: self._nested(f"{path}.{name}", each) for name, each in node.attributes.items()}
            return make_object(node.class_name, found)
        return make_plain(node)

    def _nested(self, path: str, node: Argument) -> Any:
        """Read a nested value, which does not go into ``Inputs.known``."""
        found = self._value(path, node)
        return self._on_device(found) if isinstance(node, Values) and not node.on_host else found

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a few numbers to the device without a wait: the driver has its own copy when this returns."""
        return tensor.to(self._device, non_blocking=True)

    def _tensor(self, path: str, node: Tensor) -> torch.Tensor:
        if isinstance(node, Values):
            found = _build_tensor(path, node)
            return found if node.on_host else self._on_device(found)
        if isinstance(node, Kept):
            found = self._kept.find(self._client, node.kept_id)
            if tuple(found.shape) != node.shape or found.dtype != torch_dtype(node.dtype):
                raise UnknownKept(f"{path}: kept tensor {node.kept_id} has another shape or dtype; send it again")
            return found
        if isinstance(node, InIo):
            self._count_bytes(path, node.place.size_bytes)
            found = self._unchecked[path] = self._read(path, node)
            if node.order is not None:
                if sorted(node.order) != list(range(found.ndim)):
                    raise BadRequest(f"{path}: order {list(node.order)} is no order of its {found.ndim} dimensions")
                found = found.permute(node.order)
            if node.kept_id is not None:
                self._to_keep[node.kept_id] = found
            return found
        rows = []
        for number, part in enumerate(node.parts):
            found = self._tensor(f"{path}.rows[{number}]", part.tensor)
            if found.ndim == 0:
                raise BadRequest(f"{path}.rows[{number}]: a tensor without dimensions has no rows; give it one")
            if found.shape[0] > 1 and part.times > 1:
                self._count_bytes(path, found.nbytes * part.times)
            rows.append(_repeat_rows(found, part.times))
        if len(rows) == 1:
            return rows[0]
        if len({(row.shape[1:], row.dtype) for row in rows}) > 1:
            shapes = listed(f"{list(row.shape)} {row.dtype}" for row in rows)
            raise BadRequest(f"{path}: rows of different shapes or dtypes cannot be joined: {shapes}")
        self._count_bytes(path, sum(row.nbytes for row in rows))
        return torch.cat(rows)

    def _read(self, path: str, node: InIo) -> torch.Tensor:
        if not node.in_device_io:
            device = torch.device("cpu") if node.on_host else self._device
            return self._io.read(path, node.place, device, waits=False)
        if self._device_io is None:
            raise BadRequest(f"{path}: is in device memory, but the request describes no block of it (device_io)")
        if node.on_host or node.kept_id is not None:
            raise BadRequest(f"{path}: a tensor that is kept or stays on the host is sent in the I/O block")
        return self._device_io.read(path, node.place)

    def _count_bytes(self, path: str, size_bytes: int) -> None:
        """Add to the bytes that the job's arguments take; all ranks count the same."""
        self._taken_bytes += size_bytes
        if self._taken_bytes > limits.MAX_ARGUMENT_BYTES:
            raise LimitExceeded(
                f"{path}: with it, the arguments of one job take {self._taken_bytes} bytes, at most "
                f"{limits.MAX_ARGUMENT_BYTES}; send fewer parts or rows at a time"
            )


def check_names(given: Collection[str], facts: Collection[ArgumentFacts], what: str) -> None:
    """Check that no argument is unknown or missing.

    Raises:
        BadRequest: names them, and the accepted ones.
    """
    taken = {each.name for each in facts}
    needed = {each.name for each in facts if each.is_needed}
    if unknown := sorted(set(given) - taken):
        raise BadRequest(f"{what}: {listed(unknown)} cannot be given; it takes {', '.join(sorted(taken))}")
    if missing := sorted(needed - set(given)):
        raise BadRequest(f"{what}: {listed(missing)} is missing; it takes {', '.join(sorted(taken))}")


def _build_tensor(path: str, node: Values) -> torch.Tensor:
    if len(node.values) != math.prod(node.shape):
        raise BadRequest(f"{path}: {len(node.values)} values for the shape {list(node.shape)}")
    try:
        found = torch.tensor(node.values, dtype=torch_dtype(node.dtype)).reshape(node.shape)
    except RuntimeError as error:
        raise BadRequest(f"{path}: not all of its values can be {node.dtype}: {error}") from error
    if not found.is_floating_point() and any(value != int(value) for value in node.values):
        raise BadRequest(f"{path}: not all of its values are whole numbers, as {node.dtype} needs")
    if found.is_floating_point() and not all(map(math.isfinite, found.flatten().tolist())):
        raise BadRequest(f"{path}: some values are not finite in {node.dtype}")
    return found


def _host_values(tensor: torch.Tensor) -> tuple[float, ...]:
    """Return the values of a host tensor, rounded to its dtype, so that equal tensors give equal values."""
    return tuple(tensor.reshape(-1).tolist())


def _repeat_rows(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each row ``times`` times; a view if there is one row."""
    if times == 1:
        return tensor
    return tensor.expand(times, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor.repeat_interleave(times, dim=0)
