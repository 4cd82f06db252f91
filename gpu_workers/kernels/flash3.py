"""FlashAttention 3 without its backward pass, from the package ``fa3-fwd``; the last round of tiles is split.

A multiprocessor works on one tile at a time: 128 queries of one head, with all keys. Tiles seldom come out even, and a
last round that has few of them takes as long as any other: 12 heads of 4,608 tokens are 3.27 rounds on an H200, and
take the time of four. Those few are split by their keys, so that three multiprocessors share each of them, and what
they found is added up, in float32 and always in the same order.

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
"""More of them cost more to add up than they save: seven and eleven took longer on an H100."""
FEWEST_KEYS: Final = 4096
"""With fewer keys a round is so short that a second launch takes as long."""


class Division(NamedTuple):
    """Queries of each head, from the first, that fill whole rounds; those after them are for the split one."""

    whole: int
    split: int


def is_installed() -> bool:
    return find_spec("fa3_fwd_interface") is not None


def divide(heads: int, queries: int, keys: int, processors: int) -> Division:
    """Divide the queries of ``heads`` (of all images) so that a last round with few tiles is split.

    Where splitting it would take longer, all of them are ``whole``.
    """
    tiles = -(-queries // TILE_TOKENS)
    whole = heads * tiles // processors * processors // heads
    last = (tiles - whole) * heads
    if keys < FEWEST_KEYS or whole == 0 or not 0 < last * PARTS <= processors:
        return Division(queries, 0)
    return Division(whole * TILE_TOKENS, queries - whole * TILE_TOKENS)


def forward() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function: (batch, heads, tokens, 128) of queries, keys and values in, the same of queries out.

    Raises:
        ImportError: the package is missing, or was built for another torch.
    """
    # Its function for Python also serves training, and takes the host three times as long as the operator below it.
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
