"""An operator that stands for an attention in the graph of a compiled block: what computes it is known when it runs.

A graph holds the number of the attention within its block and nothing of the block itself, so all blocks with the same
operations share one graph, on one rank and with tokens split over ranks. Each attention takes the result of the one
before it, which no computation reads: a compiler cannot change their order, in which ranks exchange tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""Attention number ``n`` of a block, of a query, a key, a value, and a mask or ``None``."""

NAME: Final = "xditd.attend.default"
"""The operator's name in recorded graphs."""

SCHEMA: Final = (
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? after, int number, bool heads_first)"
    " -> Tensor"
)

# Kept for the life of the process: torch removes the operators of a library that is freed.
_LIBRARY: Final = torch.library.Library("xditd", "DEF")
_LIBRARY.define(SCHEMA)


class _Current(threading.local):
    attend: Attend | None = None


_CURRENT: Final = _Current()
"""What computes the attention of the block that this thread runs now."""


@contextmanager
def attention_by(attend: Attend) -> Iterator[None]:
    """Let ``attend`` compute the attentions of the compiled block that this thread runs."""
    before, _CURRENT.attend = _CURRENT.attend, attend
    try:
        yield
    finally:
        _CURRENT.attend = before


def in_layout(result: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """Return a result with the strides that the operator declares.

    They are contiguous with tokens before heads, in which order kernels for attention write their results:
    ``heads_first`` says that the dimensions are given the other way round.
    """
    return result.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else result.contiguous()


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    _: torch.Tensor | None,
    number: int,
    heads_first: bool,
) -> torch.Tensor:
    if _CURRENT.attend is None:
        raise RuntimeError("the operator of an attention runs outside of a compiled block")
    return in_layout(_CURRENT.attend(number, query, key, value, mask), heads_first)


def _attend_fake(
    query: torch.Tensor,
    _: torch.Tensor,
    value: torch.Tensor,
    __: torch.Tensor | None,
    ___: torch.Tensor | None,
    ____: int,
    heads_first: bool,
) -> torch.Tensor:
    return in_layout(query.new_empty((*query.shape[:-1], value.shape[-1])), heads_first)


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("xditd::attend", _attend_fake, lib=_LIBRARY)
