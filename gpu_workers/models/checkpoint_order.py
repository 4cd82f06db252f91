"""Modules of diffusers that read a tensor in the order of the checkpoint.

diffusers' converters reorder such tensors, which copies them; these modules need no copy.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.normalization import AdaLayerNormContinuous


class CheckpointOrderNorm(AdaLayerNormContinuous):
    """``AdaLayerNormContinuous`` for checkpoints whose projection gives shift first, then scale.

    diffusers reads scale first, and its converters swap both halves (``single_file_utils.py``, ``swap_scale_shift``).
    """

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        shift, scale = torch.chunk(emb, 2, dim=1)
        return cast(torch.Tensor, self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :])
