"""Agreement between ranks over gloo: one flag each, never an object, so that nothing is unpickled.

Every rank must call the same function at the same point. Single-rank groups agree with themselves at once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def agree(ok: bool) -> bool:
    """Return whether ``ok`` is true on every rank."""
    if dist.get_world_size() == 1:
        return ok
    flag = torch.tensor([int(ok)], dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def broadcast_stop(flag: bool) -> bool:
    """Return rank 0's ``flag`` on every rank; the others' arguments are ignored."""
    if dist.get_world_size() == 1:
        return flag
    message = torch.tensor([int(flag)], dtype=torch.int32)
    dist.broadcast(message, src=0)
    return bool(message.item())
