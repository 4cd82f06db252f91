"""Tensors that clients sent once and name from then on, on this rank's device."""

from __future__ import annotations

from collections import OrderedDict

import torch

from xditd.ipc import limits
from xditd.ipc.errors import UnknownKept
from xditd.ipc.processes import ProcessIdentity


class KeptTensors:
    """What each client may name, bounded by count and bytes; least recently used first out.

    A tensor stays as it was sent, at one address. Every rank gets the same jobs in the same order, so all keep the
    same.
    """

    def __init__(self, max_count: int = limits.MAX_KEPT_TENSORS, max_bytes: int = limits.MAX_KEPT_BYTES) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._by_client: dict[ProcessIdentity, OrderedDict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def find(self, client: ProcessIdentity, kept_id: str) -> torch.Tensor:
        """Return what a client sent under this id. Nobody writes to it.

        Raises:
            UnknownKept: never sent, or pushed out.
        """
        kept = self._by_client.get(client, OrderedDict())
        found = kept.get(kept_id)
        if found is None:
            raise UnknownKept(f"kept tensor {kept_id}: not known to this worker; send it again")
        kept.move_to_end(kept_id)
        return found

    def keep(self, client: ProcessIdentity, kept_id: str, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of an older one of its id; one that is larger than the bound is not kept."""
        kept = self._by_client.setdefault(client, OrderedDict())
        kept.pop(kept_id, None)
        if tensor.nbytes > self._max_bytes:
            return  # and nothing else goes for it
        kept[kept_id] = tensor
        total = sum(each.nbytes for each in kept.values())
        while len(kept) > self._max_count or total > self._max_bytes:
            total -= kept.popitem(last=False)[1].nbytes

    def forget(self, client: ProcessIdentity) -> None:
        """Free what a client that is gone had sent."""
        self._by_client.pop(client, None)
