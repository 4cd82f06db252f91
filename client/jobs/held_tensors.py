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
from xditd.ipc.transports.tensor_views import torch_dtype

RELEASE_AFTER_S: Final = 0.05
"""Tensors of one object are dropped one after the other: they are released together."""


class HeldTensor(torch.Tensor):
    """A tensor whose values are in the workers.

    As an argument of a call it costs nothing. Any operation on it in this process first copies its values here.
    """

    held: Held
    store: HeldStore

    @staticmethod
    def __new__(cls, held: Held, store: HeldStore, device: torch.device) -> HeldTensor:
        made: HeldTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=torch_dtype(held.dtype), device=device
        )
        made.held, made.store = held, store
        weakref.finalize(made, store.note_dropped, held.held_id).atexit = False
        return made

    def __init__(self, held: Held, store: HeldStore, device: torch.device) -> None:
        pass  # all is done in __new__, as for every tensor subclass

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(HeldTensor, HeldTensor.read, (args, kwargs or {}))
        return function(*args, **kwargs)

    def read(self) -> torch.Tensor:
        """Copy the values to this process.

        Raises:
            LeaseLost: the workers that held it have ended.
        """
        return self.store.read(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<HeldTensor {self.held.held_id} {list(self.shape)} {self.held.dtype}, in the workers>"


class HeldStore:
    """The held tensors of one session. ``read`` copies one here, ``release`` frees ids in the workers."""

    def __init__(self, read: Callable[[HeldTensor], torch.Tensor], release: Callable[[tuple[str, ...]], None]) -> None:
        self.read = read
        self._release = release
        # A finalizer may run in any thread at any point, also inside a lock: SimpleQueue.put is safe there.
        self._dropped: SimpleQueue[str | None] = SimpleQueue()
        threading.Thread(target=self._run, name="xditd-held", daemon=True).start()

    def note_dropped(self, held_id: str) -> None:
        """Note that this process has no more use of a tensor."""
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
