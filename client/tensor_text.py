"""A short text about a tensor, for ``__repr__``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def tensor_text(tensor: torch.Tensor) -> str:
    """Describe a tensor without its values: ``(1, 16, 128, 128) float32 on cpu``."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
