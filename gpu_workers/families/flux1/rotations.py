"""Rotary embeddings of one rank's tokens, as the fused blocks read them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from xditd.gpu_workers.parallel.token_partition import RankTokens, pad_end

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each (rows, 64)."""


class Rotations:
    """Computes the angles of one rank's text and image tokens, and caches the last ones.

    ``embed`` is the model's ``pos_embed``: from ids, (rows, 3), to cosines and sines, each value twice in a row.
    """

    def __init__(self, embed: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._embed = embed
        self._cached: tuple[torch.Tensor, torch.Tensor, Angles] | None = None

    def __call__(self, txt_ids: torch.Tensor, img_ids: torch.Tensor, own: RankTokens) -> Angles:
        """Return the angles of the tokens that ``own`` names; the same ones for the same id tensors."""
        cached = self._cached
        if cached is None or cached[0] is not txt_ids or cached[1] is not img_ids:
            ids = torch.cat([txt_ids[own.text], pad_end(img_ids[own.image], own.padding, dim=0)])
            cos, sin = self._embed(ids)
            cached = self._cached = (txt_ids, img_ids, (cos[:, ::2].contiguous(), sin[:, ::2].contiguous()))
        return cached[2]
