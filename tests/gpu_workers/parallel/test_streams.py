"""How tokens are split; that ranks gather and exchange them is in ``attending_ranks.py``."""

from __future__ import annotations

import pytest
import torch

from xditd.gpu_workers.parallel.streams import Stream, take


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [0, 1, 3, 7, 8, 13, 4096, 4097])
def test_tokens_are_split_as_evenly_as_possible(tokens: int, ranks: int) -> None:
    stream = Stream.of(tokens, ranks)
    assert len(stream.counts) == ranks
    assert stream.tokens == tokens
    assert max(stream.counts) - min(stream.counts) <= 1
    assert list(stream.counts) == sorted(stream.counts, reverse=True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_tokens_of_ranks_follow_each_other(ranks: int) -> None:
    stream = Stream.of(13, ranks)
    whole = torch.arange(26).view(13, 2)
    assert torch.equal(torch.cat([take(whole, 0, stream, rank) for rank in range(ranks)]), whole)
    turned = whole.t()
    assert torch.equal(torch.cat([take(turned, -1, stream, rank) for rank in range(ranks)], dim=-1), turned)


def test_a_rank_takes_a_view() -> None:
    whole = torch.zeros(2, 5, 3)
    take(whole, 1, Stream.of(5, 2), 1).fill_(1)
    assert whole[0, :, 0].tolist() == [0, 0, 0, 1, 1]
