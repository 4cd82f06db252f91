"""Attention over one whole sequence in a forward whose tokens are split: ranks exchange tokens for heads around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from xditd.gpu_workers.models.token_plans import Exchange, PlanFault
from xditd.gpu_workers.parallel.streams import Ranks, Stream, gather, take
from xditd.gpu_workers.parallel.token_attention import heads_to_tokens, tokens_to_heads

FindStream = Callable[[str], Stream]


class ExchangedAttention:
    """A submodule whose attention is declared as an ``Exchange``.

    Raises:
        PlanFault: it lacks a projection, or the number of its heads.
    """

    def __init__(self, module: torch.nn.Module, declared: Exchange) -> None:
        self._stream = declared.stream
        try:
            self._heads_of = {name: getattr(module, of) for name, of in declared.inputs.items()}
            self._inputs = {module.get_submodule(name): heads for name, heads in self._heads_of.items()}
            self._output = module.get_submodule(declared.output)
        except AttributeError as error:
            raise PlanFault(f"an attention is not as the plan declares: {error}") from error
        # That of the queries.
        self._heads = next(iter(self._inputs.values()))

    def hook(self, find: FindStream, ranks: Ranks) -> list[torch.utils.hooks.RemovableHandle]:
        """Exchange around every call, until the handles are removed. ``find`` returns a stream of the forward."""
        return [
            *(
                projection.register_forward_hook(partial(self._to_heads, find, ranks, heads))
                for projection, heads in self._inputs.items()
            ),
            self._output.register_forward_pre_hook(partial(self._to_tokens, find, ranks)),
        ]

    def share_heads(self, projection: str, ranks: Ranks) -> Stream | None:
        """Return how ranks share the heads of a projection, ``None`` if all have all.

        Raises:
            PlanFault: no projection of this name is exchanged.
        """
        heads = self._heads_of.get(projection)
        if heads is None:
            raise PlanFault(f"the plan exchanges no projection {projection}")
        shares = self._shares(heads, ranks)
        return None if shares is None else Stream(shares)

    def _shares(self, heads: int, ranks: Ranks) -> tuple[int, ...] | None:
        """Return how many of its heads each rank has, or ``None`` if all have all."""
        known = set(self._inputs.values())
        if any(each % ranks.size for each in known) and (len(known) > 1 or heads < ranks.size):
            return None
        return Stream.of(heads, ranks.size).counts

    def _to_heads(
        self, find: FindStream, ranks: Ranks, heads: int, _: torch.nn.Module, __: Any, own: torch.Tensor
    ) -> torch.Tensor:
        counts = find(self._stream).counts
        if own.ndim != 3 or own.shape[1] != counts[ranks.rank] or own.shape[2] % heads:
            raise PlanFault(
                f"a projection gives the shape {list(own.shape)}, for {counts[ranks.rank]} tokens of {self._stream} "
                f"and {heads} heads"
            )
        shares = self._shares(heads, ranks)
        if shares is None:
            return gather(own, 1, counts, ranks)
        size = own.shape[2] // heads
        return tokens_to_heads(own, counts, [share * size for share in shares], ranks)

    def _to_tokens(
        self, find: FindStream, ranks: Ranks, _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        attended, *others = args
        stream = find(self._stream)
        shares = self._shares(self._heads, ranks)
        own_heads = self._heads if shares is None else shares[ranks.rank]
        if attended.ndim != 3 or attended.shape[1] != stream.tokens or attended.shape[2] % own_heads:
            raise PlanFault(
                f"an attention gives the shape {list(attended.shape)}, for {stream.tokens} tokens of {self._stream} "
                f"and {own_heads} heads"
            )
        if shares is None:
            return take(attended, 1, stream, ranks.rank), *others
        size = attended.shape[2] // own_heads
        widths = [share * size for share in shares]
        return heads_to_tokens(attended, stream.counts, widths, ranks), *others
