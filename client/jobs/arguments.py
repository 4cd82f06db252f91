"""Convert the arguments of calls (trees of tensors and numbers) to messages, and results back to trees of tensors."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.client.io_places import DevicePlaces, IoPlaces
from xditd.client.tensor_text import tensor_text
from xditd.ipc import limits
from xditd.ipc.arguments import Argument, InIo, Kept, ListOf, MapOf, Repeated, Rows, TupleOf, Values
from xditd.ipc.errors import BadRequest, Internal
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.tensor_views import align, dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch

    from xditd.client.session import Session

MAX_VALUES: Final = 64
"""CPU tensors of at most this many elements are sent in the message itself: timesteps, guidance. The workers then read
them without waiting for a GPU."""

_numbers = itertools.count(1)  # for all clients of this process: workers identify kept tensors by process and id


class KeptTensor:
    """A tensor that the workers keep: the first call that uses it sends it, later ones send only its id.

    Holds a contiguous copy on the host, which a call sends again if the workers no longer have the tensor. They drop
    it when this process exits, or when they need room for tensors that were used more recently.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """Copy a tensor of any device.

        Raises:
            BadRequest: not a tensor.
            UnsupportedDtype: tensors of this dtype cannot be sent.
        """
        import torch

        if not isinstance(tensor, torch.Tensor):
            raise BadRequest(f"keep: a torch tensor is needed, not {type(tensor).__name__}")
        check_memory("keep", tensor)
        dtype_name(tensor.dtype, "keep")  # raises UnsupportedDtype before anything is copied
        self.device = tensor.device
        """The device of the original tensor."""
        self._host = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self.kept_id = f"k{next(_numbers)}" if self._host.nbytes <= limits.MAX_KEPT_BYTES else None
        """Its id in the workers; ``None`` if it is too large to be kept, and is sent with every call."""
        self.leaf = Kept(kept_id=self.kept_id or "", dtype=dtype_name(self.dtype), shape=self.shape)
        """The argument that is sent once it is kept."""
        self._kept_by: weakref.ref[Session] | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The copy on the host. Do not write to it: workers would keep the old values."""
        return self._host

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._host.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._host.dtype

    def is_kept_by(self, session: Session) -> bool:
        """Return whether a session's workers were sent it; they may have dropped it since."""
        return self._kept_by is not None and self._kept_by() is session

    def note_kept_by(self, session: Session) -> None:
        if self.kept_id is not None:
            self._kept_by = weakref.ref(session)

    def __repr__(self) -> str:
        return f"<KeptTensor {self.kept_id or 'too large to be kept'} {tensor_text(self._host)}>"


class RowsOf:
    """Tensors concatenated along dimension 0, each with its rows repeated: one conditioning for every image of a batch.

    ``parts`` are ``(tensor or KeptTensor, times)``. The workers repeat and concatenate them, so each is sent once.
    """

    def __init__(self, parts: Sequence[tuple[torch.Tensor | KeptTensor, int]]) -> None:
        if not isinstance(parts, list | tuple) or not all(isinstance(each, list | tuple) for each in parts):
            raise BadRequest(f"rows: {parts!r:.100} is not a list of pairs, of a tensor and how many times it stands")
        if any(len(each) != 2 for each in parts):
            raise BadRequest("rows: a list of pairs is needed, of a tensor and how many times it stands")
        self.parts = tuple((tensor, times) for tensor, times in parts)
        for _, times in self.parts:
            if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= limits.MAX_BATCH:
                raise BadRequest(f"rows: {times!r} times is not a whole number from 1 to {limits.MAX_BATCH}")
        if not 1 <= len(self.parts) <= limits.MAX_BATCH:
            raise BadRequest(f"rows: {len(self.parts)} tensors; give from 1 to {limits.MAX_BATCH} with how many times")

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{each if isinstance(each, KeptTensor) or not hasattr(each, 'device') else tensor_text(each)} x {times}"
            for each, times in self.parts
        )
        return f"<RowsOf {parts}>"


class ArgumentWriter:
    """Converts the arguments of a job for its request, and reserves room in its block for the tensors among them.

    A tensor that is given twice is sent once. Kept tensors for which ``is_kept`` returns true are sent by id. CPU
    tensors of at most ``max_values`` elements are sent in the message. Large tensors on a GPU get room in
    ``device_places``, if that is given.
    """

    def __init__(
        self,
        io_places: IoPlaces,
        is_kept: Callable[[KeptTensor], bool] = lambda _: False,
        *,
        max_values: int = MAX_VALUES,
        device_places: DevicePlaces | None = None,
    ) -> None:
        self.inputs: list[tuple[IoTensor, torch.Tensor]] = []
        """The tensors to write to the block, with their places."""
        self.device_inputs: list[tuple[IoTensor, torch.Tensor]] = []
        """The same for the block of device memory."""
        self.kept: list[KeptTensor] = []
        """The tensors that the workers keep when the job is done."""
        self.device: torch.device | None = None
        """The device of the first tensor of the latest arguments."""
        import torch

        self._tensor_class = torch.Tensor
        self._io_places = io_places
        self._is_kept = is_kept
        self._max_values = max_values
        self._device_places = device_places
        self._places: dict[int, InIo] = {}
        self._count = 0

    def write(self, arguments: Mapping[str, Any], where: str = "") -> dict[str, Argument]:
        """Convert the arguments of one forward. ``where`` is put before their names in errors.

        Raises:
            BadRequest: a value that cannot be sent; the message has its path, such as ``cap_feats[1]``.
            UnsupportedDtype: a tensor of a dtype that cannot be sent.
        """
        self.device = None
        self._count = 0
        names = {check_text(f"{where}arguments: name", name): value for name, value in arguments.items()}
        return {name: self._write(f"{where}{name}", value, 1) for name, value in names.items()}

    def _write(self, path: str, value: Any, depth: int) -> Argument:
        self._count += 1
        if self._count > limits.MAX_ARGUMENTS:
            raise BadRequest(f"{path}: one forward takes {limits.MAX_ARGUMENTS} values in total; join them to a tensor")
        if isinstance(value, (self._tensor_class, KeptTensor)):  # checked first: most are, and this runs every step
            return self._write_tensor(path, value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return check_text(path, value)
        if isinstance(value, int):
            return _whole(path, value)
        if isinstance(value, float):
            return _finite(path, value)
        if isinstance(value, RowsOf):
            return Rows(
                parts=tuple(
                    Repeated(tensor=self._write_tensor(f"{path}.rows[{number}]", tensor), times=times)
                    for number, (tensor, times) in enumerate(value.parts)
                )
            )
        if not isinstance(value, (list, tuple, Mapping)):
            return self._write_tensor(path, value)
        if depth == limits.MAX_ARGUMENT_DEPTH:
            raise BadRequest(f"{path}: arguments may be nested {limits.MAX_ARGUMENT_DEPTH} levels deep at most")
        if isinstance(value, Mapping):
            keys = {check_text(f"{path}: key", key): each for key, each in value.items()}
            return MapOf(items={key: self._write(f"{path}.{key}", each, depth + 1) for key, each in keys.items()})
        if hasattr(value, "_fields"):
            raise BadRequest(f"{path}: a {type(value).__name__} with names; give a tuple without names")
        items = tuple(self._write(f"{path}[{number}]", each, depth + 1) for number, each in enumerate(value))
        return ListOf(items=items) if isinstance(value, list) else TupleOf(items=items)

    def _write_tensor(self, path: str, value: Any) -> Values | InIo | Kept:
        if isinstance(value, KeptTensor):
            self._note_device(value.device)
            return self._write_kept(value)
        if not isinstance(value, self._tensor_class):
            raise BadRequest(
                f"{path}: {type(value).__name__} cannot be sent; give a torch tensor, what keep() returns, RowsOf, a "
                "number, a string, None, or a list, tuple or dict of them"
            )
        check_memory(path, value)
        self._note_device(value.device)
        dtype = dtype_name(value.dtype, path)
        if value.device.type == "cpu" and value.numel() <= self._max_values:
            values = value.detach().flatten().tolist()
            if value.dtype.is_floating_point:
                for number in values:
                    _finite(path, number)
            return Values(dtype=dtype, shape=tuple(value.shape), values=tuple(values))
        return self._place(value)

    def _write_kept(self, kept: KeptTensor) -> InIo | Kept:
        if kept.kept_id is not None and self._is_kept(kept):
            return kept.leaf
        self.kept.append(kept)
        place = self._place(kept.tensor)
        return InIo(offset_bytes=place.offset_bytes, dtype=place.dtype, shape=place.shape, kept_id=kept.kept_id)

    def _place(self, tensor: torch.Tensor) -> InIo:
        leaf = self._places.get(id(tensor))
        if leaf is None:
            on_device = self._device_places is not None and self._device_places.takes(tensor)
            places = self._device_places if on_device and self._device_places is not None else self._io_places
            place = places.add_input(tensor)
            (self.device_inputs if on_device else self.inputs).append((place, tensor))
            leaf = self._places[id(tensor)] = InIo(
                offset_bytes=place.offset_bytes, dtype=place.dtype, shape=place.shape, in_device_io=on_device
            )
        return leaf

    def _note_device(self, device: torch.device) -> None:
        if self.device is None:
            self.device = device


def result_room(value: Any, item_bytes: int) -> int:
    """Bytes for results with the shapes of the tensors in ``value``, at ``item_bytes`` or more for each element."""
    import torch

    if isinstance(value, (torch.Tensor, KeptTensor)):
        tensor = value.tensor if isinstance(value, KeptTensor) else value
        return align(tensor.numel() * max(tensor.element_size(), item_bytes))
    if isinstance(value, RowsOf):
        return sum(times * result_room(tensor, item_bytes) for tensor, times in value.parts)
    if isinstance(value, (list, tuple)):
        return sum(result_room(each, item_bytes) for each in value)
    return 0


def read_results(tree: Argument, device: torch.device, read: Callable[[InIo, torch.device], torch.Tensor]) -> Any:
    """Convert the results of a forward to tensors on ``device``, in the same tuples, lists and dicts."""
    if isinstance(tree, InIo):
        return read(tree, device)
    if isinstance(tree, (ListOf, TupleOf)):
        items = [read_results(each, device, read) for each in tree.items]
        return items if isinstance(tree, ListOf) else tuple(items)
    if isinstance(tree, MapOf):
        return {key: read_results(each, device, read) for key, each in tree.items.items()}
    if isinstance(tree, Values):
        import torch

        return torch.tensor(tree.values, dtype=torch_dtype(tree.dtype), device=device).reshape(tree.shape)
    if isinstance(tree, (Kept, Rows)):
        raise Internal(f"the workers answered a call with {type(tree).__name__}, which no client can read")
    return tree


def check_text(path: str, text: object) -> str:
    """Refuse a name, a key or a text that cannot be sent.

    The daemon cannot decode a message with a key that is not a string, so it could not even reply to it.

    Raises:
        BadRequest: not a string, or too long.
    """
    if not isinstance(text, str):
        raise BadRequest(f"{path}: {text!r:.200} is of type {type(text).__name__}, use a string")
    if len(text) > limits.MAX_NAME_CHARS:
        raise BadRequest(f"{path}: a string of {len(text)} characters, use {limits.MAX_NAME_CHARS} at most")
    return text


def check_memory(path: str, tensor: torch.Tensor) -> None:
    """Check that the memory of a tensor has all of its values.

    Raises:
        BadRequest: a tensor on meta, a sparse or a nested one, one inside of a transform of ``torch.func``, or one of
            a class with operations of its own.
    """
    import torch

    kind = type(tensor)
    if tensor.is_meta:
        what = "on the meta device and has no values"
    elif tensor.is_nested or tensor.layout is not torch.strided:
        what = f"of the layout {'nested' if tensor.is_nested else tensor.layout}: use to_dense()"
    elif torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        what = "inside of vmap or another transform of torch.func: call the module outside of it"
    elif kind not in (torch.Tensor, torch.nn.Parameter) and _has_own_operations(kind):
        what = f"a {kind.__module__}.{kind.__qualname__}, which computes in its own way: give a plain tensor"
    else:
        return
    raise BadRequest(f"{path}: this tensor cannot be sent, it is {what}")


def _has_own_operations(kind: type[torch.Tensor]) -> bool:
    """Return whether a class replaces operations of torch, as those of quantised and distributed tensors do."""
    import torch

    own = kind.__mro__[: kind.__mro__.index(torch.Tensor)]
    return any(
        name in vars(each)
        for each in own
        if each is not torch.nn.Parameter
        for name in ("__torch_function__", "__torch_dispatch__")
    )


def _whole(path: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise BadRequest(f"{path}: an integer of {value.bit_length()} bits; use one of at most 63 bits, or a float")
    return int(value)


def _finite(path: str, value: float) -> float:
    if not math.isfinite(value):
        raise BadRequest(f"{path}: {value!r} is not finite")
    return float(value)
