"""Kept tensors: clients send them once, then refer to them by id. They stay on this rank's device."""

from __future__ import annotations

from collections import OrderedDict

import torch

from xditd.ipc import limits
from xditd.ipc.errors import UnknownKept
from xditd.ipc.processes import ProcessIdentity


class KeptTensors:
    """An LRU cache of tensors for each client, bounded by count and bytes.

    A tensor keeps its values and its address. All ranks keep the same, since they get the same jobs in the same order.
    """

    def __init__(self, max_count: int = limits.MAX_KEPT_TENSORS, max_bytes: int = limits.MAX_KEPT_BYTES) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._by_client: dict[ProcessIdentity, OrderedDict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def find(self, client: ProcessIdentity, kept_id: str) -> torch.Tensor:
        """Return a client's tensor by id. Do not write to it.

        Raises:
            UnknownKept: it was never sent, or was evicted.
        """
        kept = self._by_client.get(client, OrderedDict())
        found = kept.get(kept_id)
        if found is None:
            raise UnknownKept(f"kept tensor {kept_id}: not known to this worker; send it again")
        kept.move_to_end(kept_id)
        return found

    def keep(self, client: ProcessIdentity, kept_id: str, tensor: torch.Tensor) -> None:
        """Keep a tensor in place of an older one of the same id, unless it exceeds the byte limit."""
        kept = self._by_client.setdefault(client, OrderedDict())
        kept.pop(kept_id, None)
        if tensor.nbytes > self._max_bytes:
            return  # and nothing is evicted for it
        kept[kept_id] = tensor
        total = sum(each.nbytes for each in kept.values())
        while len(kept) > self._max_count or total > self._max_bytes:
            total -= kept.popitem(last=False)[1].nbytes

    def forget(self, client: ProcessIdentity) -> None:
        """Free the tensors of a client that has exited."""
        self._by_client.pop(client, None)
