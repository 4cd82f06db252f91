"""Attention of tokens that are split over ranks: the same result for each token as on one rank, at any count.

Ulysses where the heads divide by the number of ranks: every rank attends from all tokens, with its share of the heads.
Otherwise, and where there are few keys, keys and values are gathered, and every rank attends from its own tokens with
all heads. Masks follow keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xditd.gpu_workers.parallel.streams import Ranks, Stream, exchange, gather
from xditd.ipc.errors import Unsupported

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Attention of one rank: query, key and value (batch, tokens, heads, head size), and a mask or ``None``."""


class TokenMismatch(Unsupported):
    """The tensors of an attention are not of the tokens that were said."""


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
    of_pairs: bool = False,
) -> torch.Tensor:
    """Attend from this rank's queries to the keys of all ranks.

    All are (batch, tokens, heads, head size). ``queries`` and ``keys`` say which tokens they are; with ``None`` every
    rank has all of them. There may be fewer heads of keys than of queries (grouped heads). The last two dimensions of
    ``mask`` are queries and keys: each 1, this rank's tokens, or all tokens in the order of one rank alone. One of this
    rank's queries has to have all keys: otherwise no rank has the mask of its queries and another's keys. With
    ``of_pairs`` it is true for each two of this rank's tokens that both are to be seen; queries and keys are the same.

    Raises:
        TokenMismatch: a dimension is empty, a rank has no tokens, or the mask has none of these sizes.
    """
    if any(not all(each.counts) for each in (queries, keys) if each is not None):
        raise TokenMismatch("a rank has no tokens of an attention")
    if of_pairs and mask is not None and keys is not None:
        return _attend_seen(query, key, value, mask.diagonal(dim1=-2, dim2=-1), keys, ranks, run)
    if mask is not None:
        _check_sizes(mask, queries, keys, ranks)
    if keys is None:
        if not query.shape[1]:  # not every backend takes no queries
            return query.new_empty((*query.shape[:3], value.shape[3]))
        return run(query, key, value, _own_rows(mask, queries, ranks))
    if 0 in query.shape:
        raise TokenMismatch(f"an attention has queries of the shape {list(query.shape)}")
    mask = _of_all(mask, -1, keys, ranks)
    # Without Ulysses, ranks send keys and values to all others; with it, a share of these, and of queries and results.
    has_few_keys = queries is not None and keys.total * (ranks.size - 1) < queries.total
    can_exchange = _can_exchange_heads(query, key, ranks) and _is_same_for_heads(mask)
    if queries is not None and can_exchange and not has_few_keys:
        return _ulysses(query, key, value, _of_all(mask, -2, queries, ranks), queries.counts, keys.counts, ranks, run)
    key, value = (gather(each, 1, keys.counts, ranks) for each in (key, value))
    return run(query, key, value, _own_rows(mask, queries, ranks))


def _attend_seen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_seen: torch.Tensor,
    tokens: Tokens,
    ranks: Ranks,
    run: Attend,
) -> torch.Tensor:
    """Attend among those tokens that are to be seen, of which there is a mask."""
    seen = gather(own_seen, own_seen.ndim - 1, tokens.counts, ranks).unsqueeze(-2)
    if _can_exchange_heads(query, key, ranks) and _is_same_for_heads(seen):
        whole = seen & seen.transpose(-2, -1)
        return _ulysses(query, key, value, whole, tokens.counts, tokens.counts, ranks, run)
    key, value = (gather(each, 1, tokens.counts, ranks) for each in (key, value))
    return run(query, key, value, seen & own_seen.unsqueeze(-1))


def _check_sizes(mask: torch.Tensor, queries: Tokens | None, keys: Tokens | None, ranks: Ranks) -> None:
    for dim, tokens in ((-2, queries), (-1, keys)):
        sizes = () if tokens is None else (1, tokens.counts[ranks.rank], tokens.total)
        if sizes and mask.ndim >= -dim and mask.shape[dim] not in sizes:
            raise TokenMismatch(f"a mask of the shape {list(mask.shape)} is not one of {sizes[1]} or {sizes[2]} tokens")
    if queries is None or keys is None or mask.ndim < 2 or mask.shape[-2] in (1, queries.total):
        return
    if mask.shape[-1] != keys.total:
        raise TokenMismatch("a mask of this rank's queries has to have the keys of all ranks")


def _can_exchange_heads(query: torch.Tensor, key: torch.Tensor, ranks: Ranks) -> bool:
    return query.shape[2] % ranks.size == 0 and key.shape[2] % ranks.size == 0


def _is_same_for_heads(mask: torch.Tensor | None) -> bool:
    return mask is None or mask.ndim < 3 or mask.shape[-3] == 1


def _ulysses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    queries: Sequence[int],
    keys: Sequence[int],
    ranks: Ranks,
    run: Attend,
) -> torch.Tensor:
    """Attend with this rank's share of the heads; ``queries`` and ``keys`` are how many tokens each rank has."""
    counts = (queries, keys, keys)
    shares = _share_heads_among_peers((query, key, value), counts, ranks)
    if shares is None and list(queries) == list(keys):
        shares = _share_heads((query, key, value), queries, ranks)
    elif shares is None:
        shares = [*_share_heads((query,), queries, ranks), *_share_heads((key, value), keys, ranks)]
    query_share, key_share, value_share = shares
    attended = run(query_share, key_share, value_share, mask)
    returned = None if ranks.peers is None else ranks.peers.return_tokens(attended, queries)
    if returned is not None:
        return returned
    attended = attended.flatten(2)
    return heads_to_tokens(attended, queries, [attended.shape[-1]] * ranks.size, ranks).unflatten(
        -1, (query.shape[2], -1)
    )


def _share_heads_among_peers(
    tensors: Sequence[torch.Tensor], counts: Sequence[Sequence[int]], ranks: Ranks
) -> list[torch.Tensor] | None:
    if ranks.peers is None:
        return None
    if ranks.meet is not None:
        ranks.meet(("peers", counts, [(each.shape[0], each.shape[2:], each.dtype) for each in tensors]))
    return ranks.peers.share_heads(tensors, counts)


def _share_heads(tensors: Sequence[torch.Tensor], counts: Sequence[int], ranks: Ranks) -> list[torch.Tensor]:
    """Exchange this rank's tokens of several tensors for all tokens of its share of the heads, in one exchange."""
    first = tensors[0]
    batch, mine = first.shape[:2]
    widths = [each.shape[2] // ranks.size * each.shape[3] for each in tensors]
    # Heads of one tensor after those of the other. Tokens come before rows, so that those of all ranks arrive in their
    # order.
    packed = first.new_empty((ranks.size, mine, batch, sum(widths)))
    for part, each in zip(packed.split(widths, dim=-1), tensors, strict=True):
        part.copy_(each.flatten(2).unflatten(2, (ranks.size, -1)).permute(2, 1, 0, 3))
    per_token = batch * sum(widths)
    sent, received = [mine * per_token] * ranks.size, [count * per_token for count in counts]
    arrived = exchange(packed, sent, received, ranks, (tuple(counts), per_token))
    # With one row this copies nothing.
    whole = arrived.view(-1, batch, sum(widths)).transpose(0, 1).contiguous().split(widths, dim=-1)
    return [share.unflatten(-1, (-1, each.shape[-1])) for share, each in zip(whole, tensors, strict=True)]


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
    batch, mine, width = own.shape[0], own.shape[1], widths[ranks.rank]
    # Tokens before rows: those of all ranks arrive in their order.
    packed = torch.cat([each.transpose(0, 1).reshape(-1) for each in own.split(list(widths), dim=-1)])
    sent, received = [mine * batch * each for each in widths], [count * batch * width for count in tokens]
    arrived = exchange(packed, sent, received, ranks, (tuple(tokens), tuple(widths), batch))
    return arrived.view(-1, batch, width).transpose(0, 1).contiguous()


def heads_to_tokens(share: torch.Tensor, tokens: Sequence[int], widths: Sequence[int], ranks: Ranks) -> torch.Tensor:
    """Undo ``tokens_to_heads``."""
    batch, mine, width = share.shape[0], tokens[ranks.rank], share.shape[2]
    sent, received = [count * batch * width for count in tokens], [mine * batch * each for each in widths]
    what = tuple(tokens), tuple(widths), batch
    arrived = exchange(share.transpose(0, 1).contiguous(), sent, received, ranks, what).split(received)
    parts = [part.view(mine, batch, each).transpose(0, 1) for part, each in zip(arrived, widths, strict=True)]
    return torch.cat(parts, dim=-1)


def _of_all(mask: torch.Tensor | None, dim: int, tokens: Tokens, ranks: Ranks) -> torch.Tensor | None:
    """Return a mask that along ``dim`` has all tokens in the order of ranks, or 1."""
    if mask is None or mask.ndim < -dim:
        return mask
    size, own = mask.shape[dim], tokens.counts[ranks.rank]
    if size == tokens.total:
        return mask.index_select(dim, tokens.order(mask.device)) if len(tokens.streams) > 1 else mask
    if size == 1:
        if min(tokens.counts) > 1:
            return mask
        # On a rank with a single token it may be of that token alone, or of all: both are right when gathered.
        mask = mask.expand(*mask.shape[: mask.ndim + dim], own, *mask.shape[mask.ndim + dim + 1 :])
    return gather(mask, mask.ndim + dim, tokens.counts, ranks)


def _own_rows(mask: torch.Tensor | None, queries: Tokens | None, ranks: Ranks) -> torch.Tensor | None:
    """Return a mask whose rows are this rank's queries, or one for all."""
    if mask is None or queries is None or mask.ndim < 2 or mask.shape[-2] != queries.total:
        return mask
    return mask.index_select(-2, queries.own_places(ranks.rank, mask.device))
