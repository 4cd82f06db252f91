"""Agreement on whether to go on, between ranks that reach the end of a step one after another."""

from __future__ import annotations

import torch
import torch.distributed as dist


class StopRelay:
    """Rank 0's flag on every rank, for which rank 0 waits for nobody: each rank hands it on to the next one.

    It would wait for the last stage's turn otherwise, and the stages would work one after another. Use one object for a
    job, and call it equally often on every rank.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    def __call__(self, flag: bool) -> bool:
        """Return rank 0's ``flag``; if it is true, all flags of the job have arrived by then."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        message = torch.tensor([int(flag)], dtype=torch.int32)
        if rank > 0:
            dist.recv(message, src=rank - 1)
        if rank < ranks - 1:
            work = dist.isend(message, dst=rank + 1)
            assert work is not None  # only a rank outside the group gets none
            self._sent.append((work, message))  # gloo forgets a message whose handle is gone
        stop = bool(message.item())
        if stop:
            for work, _ in self._sent:
                work.wait()
        return stop
