"""Modules in the order of checkpoints give the bits of diffusers' own, which need both halves swapped."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous

from xditd.gpu_workers.models.checkpoint_order import CheckpointOrderNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [256, 3072])
def test_the_last_norm_reads_checkpoint_order_to_the_same_bits(hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, plain = (
        cls(hidden, hidden, elementwise_affine=False, eps=1e-6).to(dtype)
        for cls in (CheckpointOrderNorm, AdaLayerNormContinuous)
    )
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        mine.data.copy_(torch.cat(theirs.data.chunk(2)[::-1]))
    tokens, conditioning = torch.randn(2, 7, hidden, dtype=dtype), torch.randn(2, hidden, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(tokens, conditioning), plain(tokens, conditioning))
