"""Low-rank branches beside a linear layer: what a LoRA adds to its result, without a change of its weight.

With the weight W, a LoRA of strength s gives ``W x + s * scale * up (down x)``. Its rows may be those of some outputs
alone, such as the queries of a fused projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Strength:
    """The strength of one LoRA in the job at hand, which all its branches read when they run.

    ``number`` is the LoRA's in its model.
    """

    __slots__ = ("__weakref__", "number", "value")

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.value = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The two factors of one layer: ``down`` (rank, inputs) and ``up`` (rows, rank), of one dtype, not owned.

    The rows are added to the outputs ``start`` to ``start + rows``.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    strength: Strength
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.up.shape[0]

    def moved(self, by: int) -> Branch:
        """Return the branch of outputs that are ``by`` further on."""
        return self if not by else Branch(self.down, self.up, self.scale, self.strength, self.start + by)

    def rows(self, start: int, stop: int) -> Branch | None:
        """Return the branch of the outputs ``start`` to ``stop``, counted from there; ``None`` if it has none."""
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return None
        up = self.up[first - self.start : last - self.start]
        return Branch(self.down, up, self.scale, self.strength, first - start)


def joined(branches: Sequence[Branch]) -> list[Branch]:
    """Return the same branches, with neighbouring rows of one factor ``up`` together again."""
    found: list[Branch] = []
    for branch in sorted(branches, key=lambda each: each.start):
        for number, other in enumerate(found):
            if _is_next(other, branch):
                rows = other.up.shape[0] + branch.up.shape[0]
                up = other.up.as_strided((rows, other.up.shape[1]), other.up.stride())
                found[number] = Branch(other.down, up, other.scale, other.strength, other.start)
                break
        else:
            found.append(branch)
    return found


def _is_next(first: Branch, second: Branch) -> bool:
    """Return whether the second one has the outputs after those of the first, and the rows after its rows in memory."""
    up = first.up
    return (
        first.down is second.down
        and first.strength is second.strength
        and first.stop == second.start
        and up.stride() == second.up.stride()
        and up.untyped_storage().data_ptr() == second.up.untyped_storage().data_ptr()
        and up.data_ptr() + up.shape[0] * up.stride(0) * up.element_size() == second.up.data_ptr()
    )


class Pair(NamedTuple):
    """What is added to a projection's outputs from ``start`` on: ``alpha * ((x @ down.T) * scales) @ up.T``.

    ``down`` is (rank, inputs), ``up`` (rows, rank), ``scales`` float32 (rank,), or ``None`` if all are ``alpha``.
    """

    down: torch.Tensor
    up: torch.Tensor
    start: int
    alpha: float
    scales: torch.Tensor | None = None


class Branches:
    """The branches beside one linear layer: those of the LoRAs of the job at hand, and none between jobs.

    ``pair`` has them in memory that graphs read, in place of ``active``, while a forward that may be captured runs.
    """

    __slots__ = ("active", "pair")

    def __init__(self) -> None:
        self.active: tuple[Branch, ...] = ()
        self.pair: Pair | None = None

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add to a layer's result ``y`` (..., outputs) what they make of its input ``x``; return it, or a new tensor.

        They compute in their own dtype, into which ``x`` is cast, with the bits of PEFT; a pair is written into ``y``
        if it is contiguous, and rounded once. A strength of 0 adds nothing: no bit changes.
        """
        if self.pair is None:
            return add_as_peft(self.active, y, x) if self.active else y
        y = y.contiguous()
        out, rows = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        _add_product(out, torch.mm(rows.to(self.pair.down.dtype), self.pair.down.t()), self.pair.up, 1.0)
        return y


def add_as_peft(branches: Sequence[Branch], y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add to a layer's result ``y`` (..., outputs) what branches make of its input ``x``; return a new tensor.

    The operations, their order and their dtypes are those of PEFT, so the bits are, too. Each computes in the dtype of
    its factors, or that of autocast; the sum has the dtype of ``y``.

    Source: PEFT, ``tuners/lora/layer.py``, ``Linear.forward``.
    """
    dtype = y.dtype
    for branch in branches:
        x = x.to(branch.down.dtype)
        factor = branch.scale * branch.strength.value
        if factor != 0.0:
            part = F.linear(F.linear(x, branch.down), branch.up)
            y = added(y, part if factor == 1.0 else part.mul_(factor), branch.start)
    return y.to(dtype)


def added(y: torch.Tensor, part: torch.Tensor, start: int) -> torch.Tensor:
    """Add to the outputs from ``start`` on; PEFT has branches of all outputs alone."""
    if part.shape[-1] == y.shape[-1]:
        return y + part
    y = y.to(torch.promote_types(y.dtype, part.dtype), copy=True)
    y[..., start : start + part.shape[-1]] += part
    return y


def add_branches(branches: Sequence[Branch], y: torch.Tensor, x: torch.Tensor) -> None:
    """Add to ``y`` (rows, outputs), in place, what branches make of ``x`` (rows, inputs), each rounded once."""
    last: tuple[torch.Tensor, torch.Tensor] | None = None
    for branch in branches:
        factor = branch.scale * branch.strength.value
        if factor == 0.0:
            continue
        if last is None or last[0] is not branch.down:  # parts of a fused projection have the same
            last = branch.down, torch.mm(x.to(branch.down.dtype), branch.down.t())
        _add_product(y[:, branch.start : branch.stop], last[1], branch.up, factor)


def _add_product(out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, factor: float) -> None:
    if out.dtype == up.dtype:
        out.addmm_(low, up.t(), alpha=factor)
    else:
        out.add_(torch.mm(low, up.t()), alpha=factor)
