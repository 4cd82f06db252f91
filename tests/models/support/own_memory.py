"""Move a loaded model from the mapped file to memory of its own."""

from __future__ import annotations

import torch


def move_to_own_memory(module: torch.nn.Module) -> None:
    """Copy all tensors of a module to memory that begins as the worker's does.

    Some processors add up in another order where weights do not begin at a multiple of 16 bytes, as in mapped files.
    """
    for each in (*module.parameters(), *module.buffers()):
        each.data = each.data.clone()
