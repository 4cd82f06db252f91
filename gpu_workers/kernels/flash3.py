"""FlashAttention 3 (forward only, package ``fa3-fwd``), with the last wave of tiles split by keys.

A multiprocessor (SM) works on one tile at a time: 128 queries of one head, with all keys. A last wave of few tiles
takes as long as a full one: 12 heads of 4,608 tokens are 3.27 waves on an H200, and take the time of four. The tiles of
such a wave are split by their keys over three SMs each, and the partial results are added in float32, always in the
same order.

Source: "FlashAttention-3" (Shah et al., 2024), and "Flash-Decoding" (Dao et al., 2023) for the split by keys.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Final, NamedTuple, cast

import torch

TILE_TOKENS: Final = 128
PARTS: Final = 3
"""SMs for each split tile; seven and eleven took longer on an H100, since their results have to be added."""
FEWEST_KEYS: Final = 4096
"""With fewer keys a wave is as short as the second launch."""


class Division(NamedTuple):
    """How many queries of each head are in full waves, and how many, after those, in the split wave."""

    whole: int
    split: int


def is_installed() -> bool:
    return find_spec("fa3_fwd_interface") is not None


def divide(heads: int, queries: int, keys: int, processors: int) -> Division:
    """Divide the queries of ``heads`` (of all images) between full waves and a split one.

    If a split would take longer, all queries are ``whole``.
    """
    tiles = -(-queries // TILE_TOKENS)
    whole = heads * tiles // processors * processors // heads
    last = (tiles - whole) * heads
    if keys < FEWEST_KEYS or whole == 0 or not 0 < last * PARTS <= processors:
        return Division(queries, 0)
    return Division(whole * TILE_TOKENS, queries - whole * TILE_TOKENS)


def forward() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the attention function; query, key, value and result are (batch, heads, tokens, 128).

    Raises:
        ImportError: the package is missing, or was built for another torch.
    """
    # Its Python function supports training, and takes the host three times as long as the operator itself.
    import_module("fa3_fwd_interface")
    attend = torch.ops.fa3_fwd.fwd

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        batch, tokens, heads, size = query.shape
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        whole, split = divide(batch * heads, tokens, key.shape[1], processors)
        scale = size**-0.5
        if not split:
            return cast(torch.Tensor, attend(query, key, value, softmax_scale=scale, num_splits=1)[0]).transpose(1, 2)
        out = torch.empty((batch, tokens, heads, size), dtype=query.dtype, device=query.device)
        for start, count, parts in ((0, whole, 1), (whole, split, PARTS)):
            rows = query.narrow(1, start, count)
            attend(rows, key, value, out=out.narrow(1, start, count), softmax_scale=scale, num_splits=parts)
        return out.transpose(1, 2)

    return run
