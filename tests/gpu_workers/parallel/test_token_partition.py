"""Partition of the tokens of one sequence; those of text and image are FLUX.1's (``test_sequence_parallel.py``)."""

from __future__ import annotations

import pytest

from xditd.ipc.errors import Unsupported

pytestmark = pytest.mark.usefixtures("layout")


@pytest.mark.parametrize(("tokens", "ranks"), [(32, 1), (32, 2), (32, 3), (64, 3), (96, 5), (4096, 6), (7, 7)])
def test_every_token_has_one_rank_and_each_rank_as_many(tokens: int, ranks: int) -> None:
    from xditd.gpu_workers.parallel.token_partition import partition_evenly

    shares = partition_evenly(tokens, ranks)
    assert len({share.count + share.padding for share in shares}) == 1
    assert [number for share in shares for number in range(share.tokens.start, share.tokens.stop)] == [*range(tokens)]
    assert all(share.padding == 0 for share in shares[:-1])
    assert all(share.count > 0 for share in shares)


@pytest.mark.parametrize(("tokens", "ranks"), [(1, 2), (6, 5), (9, 4), (32, 12)])
def test_too_few_tokens_are_refused(tokens: int, ranks: int) -> None:
    from xditd.gpu_workers.parallel.token_partition import partition_evenly

    with pytest.raises(Unsupported, match=f"{tokens} words are too few to split over {ranks} workers"):
        partition_evenly(tokens, ranks, "words")
