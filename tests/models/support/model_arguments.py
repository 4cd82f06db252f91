"""Arguments that several classes' entries share: timesteps, position ids and rotary tables as pipelines make them."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed


def timestep(value: float, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return one step for the whole batch: a view with stride 0, as a scheduler's timestep expanded by a pipeline."""
    return torch.tensor(value, dtype=dtype).expand(batch)


def flux_image_ids(height: int, width: int) -> torch.Tensor:
    """Return the (0, row, column) of each token: float32, ``(height * width, 3)``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def grid_ids(time: int, height: int, width: int, layers: int = 1) -> torch.Tensor:
    """Return the (time, row, column, layer) of each token: int64, ``(height * width * layers, 4)``."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(layers))


def video_rotary(head_dim: int, frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CogVideoX's rotary table: cosines and sines, float32, ``(frames * height * width, head_dim)`` each."""
    return get_3d_rotary_pos_embed(head_dim, ((0, 0), (height, width)), (height, width), frames)


def padding_mask(lengths: tuple[int, ...], size: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Return a mask ``(len(lengths), size)`` that is 1 for the first ``lengths[row]`` entries of each row."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).to(dtype)
