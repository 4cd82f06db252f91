"""What of a call a token plan changes beside whole sequences, and what it refuses: counts, parts of a stream, backends.

One process stands for each of three ranks in turn: none of this needs the others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux

from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import Attention, Count, PlanFault, Split, TokenPlan
from xditd.gpu_workers.parallel.streams import Ranks, Stream

RANKS = 3
TOKENS = 8
TO_TEXT = Attention(queries=("video",), keys=())


class Given(torch.nn.Module):
    """A block that keeps what it is given, and attends to a text unless it is told to leave that out."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attending()

    def forward(self, video: torch.Tensor, text: torch.Tensor, **given: Any) -> torch.Tensor:
        self.given = given
        return video + self.attn(video, text, skips=bool(given.get("skips")))


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = None
        self.backend: str | None = None

    def forward(self, video: torch.Tensor, text: torch.Tensor, skips: bool) -> torch.Tensor:
        if skips:
            return video
        query, key = (each.unflatten(-1, (2, -1)) for each in (video, text))
        return transformer_flux.dispatch_attention_fn(query, key, key, backend=self.backend).flatten(2)


def run(
    rank: int,
    split: Split | Count,
    value: Any,
    *,
    attention: Attention = TO_TEXT,
    backend: str | None = None,
    **more: Any,
) -> Any:
    """Return what the block is given on a rank in place of a value."""
    splits = {"": {"video": Split("video"), "value": split}}
    plan = TokenPlan(splits=splits, gathers={}, attentions={"attn": attention}, refused_backends=("flash",))
    block = Given()
    block.attn.backend = backend
    numbers = torch.arange(TOKENS * 4, dtype=torch.float32).view(1, TOKENS, 4)
    planned = PlannedModule(block, plan)
    planned.run(lambda: block(video=numbers, text=numbers[:, :2], value=value, **more), Ranks(None, rank, RANKS))
    return block.given["value"]


@pytest.mark.parametrize("tokens", range(TOKENS + 1))
@pytest.mark.parametrize("of_last", [False, True])
def test_counts_are_those_of_each_rank(tokens: int, of_last: bool) -> None:
    marked = torch.zeros(TOKENS, dtype=torch.int64)
    marked[TOKENS - tokens if of_last else 0 : TOKENS if of_last else tokens] = 1
    stream = Stream.of(TOKENS, RANKS)
    for rank in range(RANKS):
        expected = int(marked[stream.own(rank)].sum())
        assert stream.count(tokens, of_last, rank) == expected
        assert run(rank, Count("video", of_last), tokens) == expected


def test_no_count_stays_none() -> None:
    assert run(0, Count("video"), None) is None


@pytest.mark.parametrize("tokens", [2, 3, 5, 7, TOKENS])
def test_the_last_tokens_of_a_stream_are_split_as_the_stream_is(tokens: int) -> None:
    whole = torch.arange(TOKENS)
    stream = Stream.of(TOKENS, RANKS)
    for rank in range(RANKS):
        found = run(rank, Split("video", dim=0, is_suffix=True), whole[TOKENS - tokens :])
        own = whole[stream.own(rank)]
        assert torch.equal(found, own[own >= TOKENS - tokens])


def test_more_tokens_than_the_stream_has_are_refused() -> None:
    with pytest.raises(PlanFault, match="value has 9 tokens, video has 8"):
        run(0, Split("video", dim=0, is_suffix=True), torch.arange(TOKENS + 1))


def test_one_item_of_a_tuple_is_split() -> None:
    tables, places = (torch.arange(5), torch.arange(6)), (torch.arange(TOKENS), torch.arange(TOKENS))
    found = run(1, Split("video", dim=0, item=1), (tables, places))
    assert [each.tolist() for each in found[0]] == [each.tolist() for each in tables]
    assert [each.tolist() for each in found[1]] == [[3, 4, 5], [3, 4, 5]]


def test_an_attention_may_be_left_out_where_that_is_declared() -> None:
    run(0, Count("video"), 0, skips=True, attention=Attention(queries=("video",), keys=(), may_skip=True))
    with pytest.raises(PlanFault, match="not computed by a function that is known"):
        run(0, Count("video"), 0, skips=True)


def test_a_refused_backend_is_named() -> None:
    with pytest.raises(PlanFault, match="the attention backend 'flash'"):
        run(0, Count("video"), 0, backend="flash")


def test_picked_tokens_have_no_mask() -> None:
    picks = Attention(queries=("video",), keys=("video",), picks=True)
    with pytest.raises(PlanFault, match="other queries than keys"):
        run(0, Count("video"), 0, attention=picks)
