"""Tensors from stage to stage, and from the last stage back to the first, in the order in which they are sent.

Sizes are known on both sides, so that no message announces another. Sends never wait for the receiver: a stage goes
on with its next patch meanwhile.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from xfuser.core.distributed import get_pp_group


class StageLinks:
    """This rank's place among the stages, and its two neighbours.

    ``in_flight`` is how many messages a receiver may not have taken yet; a send waits for earlier ones.
    """

    def __init__(self, device: torch.device, in_flight: int) -> None:
        group = get_pp_group()
        self.stage: int = group.rank_in_group
        self.stages: int = group.world_size
        self._device = device
        self._in_flight = in_flight
        self._next: int = group.next_rank
        self._previous: int = group.prev_rank
        # xDiT makes a group for each direction where there are two stages: what one group does is done in order, and
        # a send that waits for its receiver would hold up the answer.
        one_way = group.device_groups if self.stages == 2 else [group.device_group]
        self._to_next = one_way[self.stage % len(one_way)]
        self._from_previous = one_way[(self.stage + 1) % len(one_way)]
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def send(self, tensor: torch.Tensor) -> None:
        """Send to the next stage, or from the last to the first; the receiver may take it later."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self._next, group=self._to_next)
        assert work is not None  # only a rank outside the group gets none
        self._under_way.append((work, tensor))  # gloo forgets a message whose handle is gone
        while len(self._under_way) > self._in_flight:
            self._under_way.popleft()[0].wait()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Receive from the stage before, or on the first from the last; on a GPU this waits there and not here."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        work = dist.irecv(tensor, src=self._previous, group=self._from_previous)
        assert work is not None
        work.wait()
        return tensor

    def settle(self) -> None:
        """Wait until every message has been taken."""
        while self._under_way:
            self._under_way.popleft()[0].wait()

    def connect(self) -> None:
        """Send one number around all stages: NCCL connects at the first message, which takes long."""
        if self.is_first:
            self.send(torch.zeros(1, device=self._device))
        token = self.receive((1,), torch.float32)
        if not self.is_first:
            self.send(token)
        self.settle()
