"""An operator that stands for a packed layer in the graph of a compiled block: its weight is known when it runs.

As with attention (``attention_operator``), a graph holds the number of the layer within its block, and neither its
weight nor its format: a swap compiles nothing, and the layer dequantises or multiplies natively as in an eager forward,
with the same bits. Its weight is in the scratch buffer only while the operator runs, so the order of operators is free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

Multiply = Callable[[int, torch.Tensor], torch.Tensor]
"""The result of packed layer number ``n`` of a block."""

NAME: Final = "xditd.packed_linear.default"
"""The operator's name in recorded graphs."""

SCHEMA: Final = "packed_linear(Tensor x, int number, int outputs) -> Tensor"

# Kept for the life of the process: torch removes the operators of a library that is freed.
_LIBRARY: Final = torch.library.Library("xditd", "FRAGMENT")
_LIBRARY.define(SCHEMA)


class _Current(threading.local):
    multiply: Multiply | None = None


_CURRENT: Final = _Current()
"""What multiplies in the block that this thread runs now."""


@contextmanager
def products_by(multiply: Multiply) -> Iterator[None]:
    """Let ``multiply`` compute the packed layers of the compiled block that this thread runs."""
    before, _CURRENT.multiply = _CURRENT.multiply, multiply
    try:
        yield
    finally:
        _CURRENT.multiply = before


def _multiply(x: torch.Tensor, number: int, _: int) -> torch.Tensor:
    if _CURRENT.multiply is None:
        raise RuntimeError("the operator of a packed layer runs outside of a compiled block")
    return _CURRENT.multiply(number, x).contiguous()


def _multiply_fake(x: torch.Tensor, _: int, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


_LIBRARY.impl("packed_linear", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("xditd::packed_linear", _multiply_fake, lib=_LIBRARY)
