"""Modules of diffusers that read a tensor in the order in which checkpoints store it, for every family that needs one.

diffusers' converters reorder such tensors, which copies them. What is read as it was lent needs no copy.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.normalization import AdaLayerNormContinuous


class CheckpointOrderNorm(AdaLayerNormContinuous):
    """Modulation by a projection of the conditioning, which checkpoints store as shift first, then scale.

    diffusers reads scale first, and its converters swap both halves (``single_file_utils.py``, ``swap_scale_shift``).
    """

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        shift, scale = torch.chunk(emb, 2, dim=1)
        return cast(torch.Tensor, self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :])
