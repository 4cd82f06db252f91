"""Attention of tokens that are split over ranks: the same result for each token as on one rank, at any count.

Ulysses where the heads divide by the number of ranks: every rank attends from all tokens, with its share of the heads.
Otherwise keys and values are gathered, and every rank attends from its own tokens with all heads. Masks follow keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xditd.gpu_workers.parallel.streams import Ranks, Stream, exchange, gather

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Attention of one rank: query, key and value (batch, tokens, heads, head size), and a mask or ``None``."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a query or a key on every rank: one or several streams, one after the other on each rank."""

    streams: tuple[Stream, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many each rank has."""
        return tuple(sum(each) for each in zip(*(stream.counts for stream in self.streams), strict=True))

    @property
    def total(self) -> int:
        return sum(stream.tokens for stream in self.streams)

    def order(self, device: torch.device) -> torch.Tensor:
        """Return the places, in the sequence of one rank alone, of the tokens in the order of ranks."""
        starts = [0, *itertools.accumulate(stream.tokens for stream in self.streams)]
        owns = [
            torch.arange(start + stream.own(rank).start, start + stream.own(rank).stop, device=device)
            for rank in range(len(self.counts))
            for start, stream in zip(starts, self.streams, strict=False)
        ]
        return torch.cat(owns)

    def own_places(self, rank: int, device: torch.device) -> torch.Tensor:
        """Return the places of one rank's tokens in the sequence of one rank alone."""
        start = sum(self.counts[:rank])
        return self.order(device)[start : start + self.counts[rank]]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    queries: Tokens | None,
    keys: Tokens | None,
    ranks: Ranks,
    run: Attend,
) -> torch.Tensor:
    """Attend from this rank's queries to the keys of all ranks.

    All are (batch, tokens, heads, head size). ``queries`` and ``keys`` say which tokens they are; with ``None`` every
    rank has all of them. There may be fewer heads of keys than of queries (grouped heads). The last two dimensions of
    ``mask`` are queries and keys: each 1, this rank's tokens, or all tokens in the order of one rank alone.
    """
    if keys is None:
        return run(query, key, value, _own_rows(mask, queries, ranks))
    mask = _keys_of_all(mask, keys, ranks)
    if queries is not None and _can_exchange_heads(query, key, ranks) and queries == keys and _is_same_for_heads(mask):
        return _ulysses(query, key, value, _rows_of_all(mask, queries, ranks), queries.counts, ranks, run)
    key, value = (gather(each, 1, keys.counts, ranks) for each in (key, value))
    return run(query, key, value, _own_rows(mask, queries, ranks))


def _can_exchange_heads(query: torch.Tensor, key: torch.Tensor, ranks: Ranks) -> bool:
    return query.shape[2] % ranks.size == 0 and key.shape[2] % ranks.size == 0


def _is_same_for_heads(mask: torch.Tensor | None) -> bool:
    return mask is None or mask.ndim < 3 or mask.shape[-3] == 1


def _ulysses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    counts: Sequence[int],
    ranks: Ranks,
    run: Attend,
) -> torch.Tensor:
    batch = query.shape[0]
    # Query, key and value in one exchange: heads of one after those of the other.
    parts = [each.flatten(2).unflatten(2, (ranks.size, -1)) for each in (query, key, value)]
    widths = [each.shape[-1] for each in parts]
    joined = torch.cat(parts, dim=-1)
    received = exchange(
        [joined[:, :, rank] for rank in range(ranks.size)], [(batch, count, sum(widths)) for count in counts], ranks
    )
    whole = torch.cat(received, dim=1).split(widths, dim=-1)
    sizes = [each.shape[-1] for each in (query, key, value)]
    all_queries, all_keys, all_values = (
        each.unflatten(-1, (-1, size)) for each, size in zip(whole, sizes, strict=True)
    )
    attended = run(all_queries, all_keys, all_values, mask)
    own = attended.flatten(2).split(list(counts), dim=1)
    mine = counts[ranks.rank]
    returned = exchange(list(own), [(batch, mine, attended.flatten(2).shape[-1])] * ranks.size, ranks)
    return torch.cat(returned, dim=-1).unflatten(-1, (query.shape[2], -1))


def without_repeats(
    key: torch.Tensor, value: torch.Tensor, repeats: int, ranks: Ranks, run: Attend
) -> tuple[torch.Tensor, torch.Tensor, Attend]:
    """Return keys and values of which each head was repeated, side by side, with each once, and what repeats them.

    They stay as they are where only the repeated heads divide by the number of ranks.
    """
    heads = key.shape[2]
    if repeats == 1 or (heads // repeats % ranks.size and heads % ranks.size == 0):
        return key, value, run

    def run_repeated(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return run(query, key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2), mask)

    return key[:, :, ::repeats], value[:, :, ::repeats], run_repeated


def tokens_to_heads(own: torch.Tensor, tokens: Sequence[int], widths: Sequence[int], ranks: Ranks) -> torch.Tensor:
    """Exchange this rank's tokens, (batch, tokens, channels), for all tokens of this rank's share of the channels.

    ``tokens`` and ``widths`` are how many tokens, and how many channels, each rank has. All ranks call this together.
    """
    sent = list(own.split(list(widths), dim=-1))
    shapes: list[tuple[int, ...]] = [(own.shape[0], count, widths[ranks.rank]) for count in tokens]
    return torch.cat(exchange(sent, shapes, ranks), dim=1)


def heads_to_tokens(share: torch.Tensor, tokens: Sequence[int], widths: Sequence[int], ranks: Ranks) -> torch.Tensor:
    """Undo ``tokens_to_heads``."""
    sent = list(share.split(list(tokens), dim=1))
    shapes: list[tuple[int, ...]] = [(share.shape[0], tokens[ranks.rank], width) for width in widths]
    return torch.cat(exchange(sent, shapes, ranks), dim=-1)


def _keys_of_all(mask: torch.Tensor | None, keys: Tokens, ranks: Ranks) -> torch.Tensor | None:
    """Return a mask whose last dimension is all keys in the order of ranks, or 1."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    if mask.shape[-1] == keys.total:
        return mask.index_select(-1, keys.order(mask.device)) if len(keys.streams) > 1 else mask
    return gather(mask, mask.ndim - 1, keys.counts, ranks)


def _own_rows(mask: torch.Tensor | None, queries: Tokens | None, ranks: Ranks) -> torch.Tensor | None:
    """Return a mask whose rows are this rank's queries, or one for all."""
    if mask is None or queries is None or mask.ndim < 2 or mask.shape[-2] != queries.total:
        return mask
    return mask.index_select(-2, queries.own_places(ranks.rank, mask.device))


def _rows_of_all(mask: torch.Tensor | None, queries: Tokens, ranks: Ranks) -> torch.Tensor | None:
    """Return a mask whose rows are all queries in the order of ranks, or one for all."""
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    if mask.shape[-2] == queries.total:
        return mask.index_select(-2, queries.order(mask.device)) if len(queries.streams) > 1 else mask
    return gather(mask, mask.ndim - 2, queries.counts, ranks)
