"""Held tensors, which forwards have made for objects of a client, such as KV caches. The client names them by id until
it releases them.

Every rank holds the same ones under the same ids, since all run the calls that have such objects, in the same order:
whole, or its share of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from xditd.gpu_workers.parallel.token_shares import TokenShares
from xditd.ipc.errors import LeaseLost
from xditd.ipc.processes import ProcessIdentity


class HeldTensors:
    """The held tensors of all clients, on this rank's device. ``group`` is in their ids: those of an ended group of
    workers must not name tensors of the next one."""

    def __init__(self, group: str = "") -> None:
        self._group = group
        self._count = 0
        self.shares = TokenShares()
        """Which of them, and which tensors of the call that runs, are shares."""
        self._by_client: dict[ProcessIdentity, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def hold(self, client: ProcessIdentity, tensor: torch.Tensor) -> str:
        """Hold a tensor until the client releases it or exits; return its new id."""
        self._count += 1
        held_id = self._id(self._count)
        self._by_client.setdefault(client, {})[held_id] = tensor
        return held_id

    def find(self, client: ProcessIdentity, held_id: str, path: str) -> torch.Tensor:
        """Return a client's tensor.

        Raises:
            LeaseLost: it was released, or was lost with workers that have ended since.
        """
        found = self._by_client.get(client, {}).get(held_id)
        if found is None:
            raise LeaseLost(
                f"{path}: its contents ({held_id}) were in workers that have ended, or were released; "
                "start the pipeline's call again, with a new cache"
            )
        return found

    @contextmanager
    def undone_on_error(self, client: ProcessIdentity) -> Iterator[None]:
        """If the block fails, free the tensors that it has held. Ranks that fail at different points then give the same
        ids again."""
        before = self._count
        try:
            yield
        except BaseException:
            self.release(client, map(self._id, range(before + 1, self._count + 1)))
            self._count = before
            raise

    def release(self, client: ProcessIdentity, held_ids: Iterable[str]) -> None:
        """Free tensors. An unknown id is no error: its worker may have ended."""
        mine = self._by_client.get(client, {})
        for held_id in held_ids:
            mine.pop(held_id, None)

    def forget(self, client: ProcessIdentity) -> None:
        """Free the tensors of a client that has exited."""
        self._by_client.pop(client, None)

    def _id(self, number: int) -> str:
        return f"h{number}{self._group}"
