"""Tensors that the workers hold for objects of this process, such as the keys and values of a KV cache.

torch is imported with this module.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final

import torch

from xditd.ipc import limits
from xditd.ipc.arguments import Held
from xditd.ipc.errors import Unsupported
from xditd.ipc.transports.tensor_views import torch_dtype

RELEASE_AFTER_S: Final = 0.05
"""Tensors of one object are dropped one after the other: they are released together."""


class ReadOnlyTensor(torch.Tensor):
    """A tensor whose values this process may not change, because those in the workers would not change with them.

    Any operation on it runs on a copy of the values. Views of it cannot be written to either.
    """

    what: str
    """What it is, for errors."""

    def read(self) -> torch.Tensor:
        """Return the values as a tensor of this process."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from torch.utils._pytree import tree_map_only

        kwargs = kwargs or {}
        schema = function._schema
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                _check_written(args[number] if number < len(args) else kwargs.get(argument.name), schema.name)
        args, kwargs = tree_map_only(ReadOnlyTensor, lambda each: each.read(), (args, kwargs))
        result = function(*args, **kwargs)
        if any(each.alias_info is not None for each in schema.returns):
            return tree_map_only(torch.Tensor, HeldView, result)
        return result

    # numpy() and tolist() read the memory of a tensor, which a tensor of this class does not have.

    def numpy(self, *, force: bool = False) -> Any:
        return self.read().numpy(force=force)

    def tolist(self) -> Any:
        return self.read().tolist()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.read().__dlpack__(**kwargs)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        _check_written(self, "data")

    def share_memory_(self) -> Any:
        raise Unsupported(f"share_memory_ of {self.what}: its values are in the workers; share a clone of it")

    # A copy, also one in a file or of another process, is a tensor of its own with the values of now.

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = memo[id(self)] = self.read().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _check_written(given: Any, what: str) -> None:
    for each in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(each, ReadOnlyTensor):
            raise Unsupported(
                f"{what}: it would change a copy of {each.what}, whose values are in the workers: clone it before "
                "you write to it, or leave the model out of components"
            )


class HeldTensor(ReadOnlyTensor):
    """A tensor whose values are in the workers.

    As an argument of a call it costs nothing. Any operation on it in this process first copies its values here; one
    that writes to it or to a view of it is refused (``Unsupported``).
    """

    held: Held
    store: HeldStore

    @staticmethod
    def __new__(cls, held: Held, store: HeldStore, device: torch.device) -> HeldTensor:
        made: HeldTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=torch_dtype(held.dtype), device=device
        )
        made.held, made.store = held, store
        made.what = f"tensor {held.held_id} of a cache"
        weakref.finalize(made, store.note_dropped, held.held_id).atexit = False
        return made

    def __init__(self, held: Held, store: HeldStore, device: torch.device) -> None:
        pass  # all is done in __new__, as for every tensor subclass

    def read(self) -> torch.Tensor:
        """Copy the values to this process.

        Raises:
            LeaseLost: the workers that held it have ended.
        """
        return self.store.read(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<HeldTensor {self.held.held_id} {list(self.shape)} {self.held.dtype}, in the workers>"


class HeldView(ReadOnlyTensor):
    """A view of the values of a held tensor, copied to this process."""

    copied: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> HeldView:
        made: HeldView = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device
        )
        made.copied = values
        made.what = "a tensor of a cache"
        return made

    def __init__(self, values: torch.Tensor) -> None:
        pass

    def read(self) -> torch.Tensor:
        return self.copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.copied)


class HeldStore:
    """The held tensors of one session. ``read`` copies one to this process, ``release`` frees ids in the workers.

    A thread calls ``release``, for tensors that were dropped, until :meth:`close`.
    """

    def __init__(self, read: Callable[[HeldTensor], torch.Tensor], release: Callable[[tuple[str, ...]], None]) -> None:
        self.read = read
        self._release = release
        self._tensors: weakref.WeakValueDictionary[tuple[str, torch.device], HeldTensor] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        # A finalizer may run in any thread at any point, also inside a lock: SimpleQueue.put is safe there.
        self._dropped: SimpleQueue[str | None] = SimpleQueue()
        threading.Thread(target=self._run, name="xditd-held", daemon=True).start()

    def tensor(self, held: Held, device: torch.device) -> HeldTensor:
        """Return the tensor of an id, one object while in use: a call may return a cache that it was given."""
        with self._lock:
            found = self._tensors.get((held.held_id, device))
            if found is None:
                found = self._tensors[held.held_id, device] = HeldTensor(held, self, device)
            return found

    def note_dropped(self, held_id: str) -> None:
        """Note that this process has dropped a tensor. Safe to call from a finalizer."""
        self._dropped.put(held_id)

    def close(self) -> None:
        """End the thread; the daemon frees what is held when the session ends."""
        self._dropped.put(None)

    def _run(self) -> None:
        while (first := self._dropped.get()) is not None:
            found = [first]
            with contextlib.suppress(Empty):
                while len(found) < limits.MAX_ARGUMENTS:
                    each = self._dropped.get(timeout=RELEASE_AFTER_S)
                    if each is None:
                        return
                    found.append(each)
            self._release(tuple(found))
