"""Arguments that many pipelines build in the same way: timesteps, masks, position ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def timestep(value: float, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a scheduler's timestep for every sample, as a view with stride 0, like ``t.expand(batch)``."""
    return torch.tensor(value, dtype=dtype).expand(batch)


def padding_mask(lengths: Sequence[int], width: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Return a mask of shape (samples, ``width``): 1 for each sample's first ``lengths[i]`` tokens."""
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).to(dtype)


def grid_ids(height: int, width: int, first: float = 0.0, start: float = 0.0) -> torch.Tensor:
    """Return the float32 ids (``first``, row, column) of an image's tokens, with rows and columns from ``start``."""
    ids = torch.full((height, width, 3), first)
    ids[..., 1] = start + torch.arange(height).unsqueeze(1)
    ids[..., 2] = start + torch.arange(width)
    return ids.reshape(height * width, 3)
