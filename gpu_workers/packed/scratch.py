"""The memory into which packed weights are dequantised, one at a time: all packed layers of a rank share it."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch


class ScratchBuffer:
    """One buffer on ``device``, as large as the largest weight of all its users.

    A layer's view is overwritten by the next layer; on a GPU the order of the stream makes that safe. Users are models:
    each reserves what its largest layer takes before its weights are plugged, and releases it with the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._users: dict[Hashable, int] = {}
        self._memory: torch.Tensor | None = None
        self._views: dict[tuple[torch.Size | tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """The bytes that are allocated."""
        return 0 if self._memory is None else self._memory.numel()

    def reserve(self, user: Hashable, size_bytes: int) -> None:
        """Make room for weights of ``size_bytes``. Views from before are invalid if the buffer grows.

        Raises:
            torch.OutOfMemoryError: the device has too little memory; earlier reservations stay.
        """
        if size_bytes > self.size_bytes:
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            self._views.clear()
            self._memory = memory
        self._users[user] = size_bytes

    def release(self, user: Hashable) -> None:
        """End a reservation; the last one frees the memory. Without a reservation nothing happens."""
        if self._users.pop(user, None) is None or self._users:
            return
        self._views.clear()
        self._memory = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # else torch keeps the memory from other programs

    def view(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the start of the buffer as a contiguous tensor, with whatever it contains."""
        found = self._views.get((shape, dtype))
        if found is None:
            assert self._memory is not None
            size = math.prod(shape) * dtype.itemsize
            found = self._views[shape, dtype] = self._memory[:size].view(dtype).view(shape)
        return found
