"""The state of one forward whose tokens are split: its streams, and the attention that it computes now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from xditd.gpu_workers.models.token_plans import Attention, Count, Length, PlanFault, Split
from xditd.gpu_workers.parallel.streams import Ranks, Stream, gather, take
from xditd.gpu_workers.parallel.token_attention import Attend, TokenMismatch, Tokens, attend, without_repeats
from xditd.ipc.name_lists import listed


@dataclass
class Site:
    """The submodule whose attention is computed now."""

    declared: Attention | None
    module: torch.nn.Module
    calls: int = 0

    def next(self) -> Attention | None:
        """Return the declaration of the next attention of the submodule.

        Raises:
            PlanFault: it computes more than are declared.
        """
        if self.declared is None:
            return None
        known = (self.declared, *self.declared.others)
        self.calls += 1
        if self.declared.picks:
            return self.declared
        if self.calls > len(known):
            raise PlanFault(f"an attention of {len(known)} declared calls computes more")
        return known[self.calls - 1]

    def repeats(self, declared: Attention, query: torch.Tensor, key: torch.Tensor) -> int:
        """Return how often the class has repeated each head of keys.

        Raises:
            PlanFault: it has not as declared.
        """
        if declared.repeats is None:
            return 1
        many, few = (getattr(self.module, name, 0) for name in declared.repeats)
        if not few or many % few or key.shape[2] != query.shape[2] or key.shape[2] % (many // few):
            raise PlanFault(f"an attention has {key.shape[2]} heads of keys, which are not repeated as declared")
        return int(many // few)


@dataclass
class ForwardState:
    """The state of one forward: the streams whose tokens were split, and the submodules whose attention runs."""

    ranks: Ranks
    streams: dict[str, Stream] = field(default_factory=dict)
    cached: dict[str, tuple[Stream, ...]] = field(default_factory=dict)
    """Tokens that are in the cache alone, by the names that the plan gives them."""
    sites: list[Site] = field(default_factory=list)

    def split(self, value: Any, split: Split | Count | Length, what: str) -> Any:
        """Return this rank's share of an argument or a result, of each tensor in it; ``what`` names it in errors.

        Raises:
            PlanFault: its tokens are not those that the plan declares.
        """
        if isinstance(split, Length):
            return self._found(split.stream, value, what).counts[self.ranks.rank] if value else value
        if isinstance(split, Count):
            return None if value is None else self.stream(split.stream).count(value, split.of_last, self.ranks.rank)
        if split.item is not None and isinstance(value, (list, tuple)):
            only = replace(split, item=None)
            return type(value)(
                self.split(each, only, what) if n == split.item else each for n, each in enumerate(value)
            )
        if isinstance(value, torch.Tensor):
            return self._split_tensor(value, split, what)
        if isinstance(value, (list, tuple)):
            return type(value)(self.split(each, split, what) for each in value)
        if isinstance(value, dict):
            return {name: self.split(each, split, what) for name, each in value.items()}
        return value

    def _split_tensor(self, tensor: torch.Tensor, split: Split, what: str) -> torch.Tensor:
        dim = split.dim + tensor.ndim if split.dim < 0 else split.dim
        if split.ndim not in (None, tensor.ndim):
            return tensor
        if not 0 <= dim < tensor.ndim:
            raise PlanFault(f"{what} has the shape {list(tensor.shape)}, its tokens are in dimension {split.dim}")
        if tensor.shape[dim] == 1:
            return tensor
        if split.is_prefix:
            known = self.stream(split.stream)
            first, rest = tensor.tensor_split([known.tokens], dim)
            if first.shape[dim] != known.tokens:
                raise PlanFault(f"{what} has {tensor.shape[dim]} tokens, {split.stream} alone has {known.tokens}")
            return torch.cat([take(first, dim, known, self.ranks.rank), rest], dim)
        if split.after in self.streams:
            return self._split_joined(tensor, dim, split, what)
        tokens = tensor.shape[dim]
        if split.is_suffix:
            known = self.stream(split.stream)
            if tokens > known.tokens:
                raise PlanFault(f"{what} has {tokens} tokens, {split.stream} has {known.tokens}")
            before = known.count(known.tokens - tokens, False, self.ranks.rank)
            first = max(0, known.own(self.ranks.rank).start - (known.tokens - tokens))
            return tensor.narrow(dim, first, known.counts[self.ranks.rank] - before)
        return take(tensor, dim, self._found(split.stream, tokens, what), self.ranks.rank)

    def _split_joined(self, tensor: torch.Tensor, dim: int, split: Split, what: str) -> torch.Tensor:
        """Split a tensor of the tokens of two streams, one after the other, each by itself."""
        first = self.stream(split.after or "")
        if tensor.shape[dim] <= first.tokens:
            raise PlanFault(f"{what} has {tensor.shape[dim]} tokens, {split.after} alone has {first.tokens}")
        before, rest = tensor.tensor_split([first.tokens], dim)
        second = self._found(split.stream, rest.shape[dim], what)
        return torch.cat([take(before, dim, first, self.ranks.rank), take(rest, dim, second, self.ranks.rank)], dim)

    def _found(self, name: str, tokens: int, what: str) -> Stream:
        """Return the stream of this name, which from now on has so many tokens: none, or some for every rank."""
        stream = self.streams.get(name)
        if name in self.cached:
            raise PlanFault(f"tokens of {name} are in the cache, and in the call as well")
        if stream is None:
            if 0 < tokens < self.ranks.size:
                raise PlanFault(f"{tokens} tokens of {name} are fewer than {self.ranks.size} workers")
            stream = self.streams[name] = Stream.of(tokens, self.ranks.size)
        if tokens != stream.tokens:
            raise PlanFault(f"{what} has {tokens} tokens, others of {name} have {stream.tokens}")
        return stream

    def split_arguments(
        self,
        splits: Mapping[str, Split | Count | Length],
        names: Sequence[str],
        _: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Split the arguments of a submodule, as a forward pre-hook; ``names`` are its positional arguments."""
        given, named = list(args), dict(kwargs)
        for name, split in splits.items():
            if name in named:
                named[name] = self.split(named[name], split, name)
            elif name in names and names.index(name) < len(given):
                given[names.index(name)] = self.split(given[names.index(name)], split, name)
        return tuple(given), named

    def split_results(
        self, splits: Mapping[int, Split | Count | Length], _: torch.nn.Module, __: Any, results: Any
    ) -> Any:
        """Split the results of a submodule, by number, as a forward hook."""
        return self._for_each(splits, results, lambda split, value: self.split(value, split, "a result"))

    def gather_results(self, gathers: Mapping[int, Split], _: torch.nn.Module, __: Any, results: Any) -> Any:
        """Gather the results of a submodule from all ranks, by number, as a forward hook."""
        return self._for_each(gathers, results, self._gather)

    def _gather(self, split: Split, own: torch.Tensor | None) -> torch.Tensor | None:
        if own is None:
            return None
        counts = self.stream(split.stream).counts
        if own.shape[split.dim] != counts[self.ranks.rank]:
            raise PlanFault(
                f"a result has {own.shape[split.dim]} tokens of {split.stream}, this worker has "
                f"{counts[self.ranks.rank]}"
            )
        return gather(own, split.dim, counts, self.ranks)

    @staticmethod
    def _for_each(splits: Mapping[int, Any], results: Any, change: Callable[[Any, Any], Any]) -> Any:
        if (count := len(results) if isinstance(results, (tuple, list)) else 1) <= max(splits):
            raise PlanFault(
                f"a submodule of the plan returns {count} results, the plan names that of number {max(splits)}"
            )
        if isinstance(results, (tuple, list)):
            found = [change(splits[number], each) if number in splits else each for number, each in enumerate(results)]
            return type(results)(found)
        return change(splits[0], results)

    def stream(self, name: str) -> Stream:
        """Return a stream by name.

        Raises:
            PlanFault: none of its tokens were split yet.
        """
        found = self.streams.get(name)
        if found is None:
            raise PlanFault(f"no tokens of {name} were split before they are used")
        return found

    def enter_attention(self, declared: Attention | None, module: torch.nn.Module, *_: Any) -> None:
        """Note that a submodule with an attention begins, as a forward pre-hook."""
        self.sites.append(Site(declared, module))

    def leave_attention(self, _: torch.nn.Module, __: Any, result: Any) -> None:
        """Note that the submodule ends, as a forward hook that is always called.

        Raises:
            PlanFault: it has computed no attention by a function that is known.
        """
        site = self.sites.pop()
        has_failed = result is None  # torch calls this also for a forward that raises
        if site.declared is not None and not (site.calls or site.declared.may_skip or has_failed):
            raise PlanFault("an attention of the plan is not computed by a function that is known")

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        run: Attend,
    ) -> torch.Tensor:
        """Compute an attention of this forward; tensors are (batch, tokens, heads, head size).

        Raises:
            PlanFault: it is not declared, or its tokens are not those that are declared.
        """
        if not self.sites:
            raise PlanFault("an attention outside of the submodules that the plan declares")
        declared = self.sites[-1].next()
        if declared is None:
            return run(query, key, value, mask)
        if declared.picks:
            return self._attend_picked(query, key, value, mask, run)
        queries = self._tokens(declared.queries, query, "queries")
        keys = self._tokens(declared.keys, key, "keys")
        repeats = self.sites[-1].repeats(declared, query, key)
        key, value, run = without_repeats(key, value, repeats, self.ranks, run)
        try:
            return attend(query, key, value, mask, queries, keys, self.ranks, run, declared.mask_of_pairs)
        except TokenMismatch as error:
            raise PlanFault(str(error)) from None

    def _attend_picked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, run: Attend
    ) -> torch.Tensor:
        if mask is not None or query.shape[1] != key.shape[1]:
            raise PlanFault("an attention among picked tokens has a mask, or other queries than keys")
        own = torch.tensor([query.shape[1]], device=query.device)
        counts = gather(own, 0, (1,) * self.ranks.size, self.ranks).tolist()
        tokens = Tokens((Stream(tuple(counts)),))
        return attend(query, key, value, None, tokens, tokens, self.ranks, run)

    def check_causal(self, is_causal: bool) -> None:
        """Raise if an attention over split tokens would be causal: no plan declares that."""
        if is_causal and self.sites and self.sites[-1].declared is not None:
            raise PlanFault("a causal attention, which no plan declares")

    def _tokens(self, names: Sequence[str], tensor: torch.Tensor, what: str) -> Tokens | None:
        if not names:
            return None
        known = tuple(
            each
            for name in names
            for each in ((self.streams[name],) if name in self.streams else self.cached.get(name, ()))
        )
        if not known:
            raise PlanFault(f"no tokens of {listed(names)} were split before they are used")
        tokens = Tokens(known)
        own = tokens.counts[self.ranks.rank]
        if tensor.ndim != 4 or tensor.shape[1] != own:
            raise PlanFault(f"an attention has {what} of the shape {list(tensor.shape)}, its streams {own} tokens")
        return tokens
