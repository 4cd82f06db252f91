"""The cache of keys and values of one forward whose tokens are split: each rank's copy gets and keeps its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xditd.gpu_workers.models.forward_state import ForwardState
from xditd.gpu_workers.models.object_tensors import Path, change_tensors, objects_of
from xditd.gpu_workers.models.token_plans import Cache, CachedHeads, CachedTokens, PlanFault
from xditd.gpu_workers.parallel.streams import Stream
from xditd.gpu_workers.parallel.token_shares import Cut, TokenShares

ShareHeads = Callable[[str], Stream | None]
"""Returns how ranks share the heads of a projection, by its name; ``None`` if every rank has all of them."""

_GIVEN, _RESULT = "argument", "result"


class CacheShares:
    """Hooks of a module around one forward: ``enter`` before it, after the arguments are split, and ``leave`` after it.

    A tensor of the cache that every rank has whole becomes this rank's share in the forward, and stays so: the object
    has the same contents. What the class puts there is this rank's share already.
    """

    def __init__(self, declared: Cache, forward: ForwardState, shares: TokenShares, share_heads: ShareHeads) -> None:
        self._declared = declared
        self._forward = forward
        self._shares = shares
        self._share_heads = share_heads
        self._given: Any = None
        self._objects: list[Any] = []
        """Those that the caller has given, which this keeps alive."""
        self._before: dict[Path, Cut] = {}

    def enter(self, names: Sequence[str], _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._given = given.get(self._declared.argument)
        self._objects = list(objects_of(self._given))
        if self._given is None:
            return
        change_tensors(self._given, self._take, path=(_GIVEN,))
        if self._declared.is_read(given):
            change_tensors(self._given, self._read)

    def leave(self, _: torch.nn.Module, __: Any, result: Any) -> None:
        change_tensors(self._given, self._note, path=(_GIVEN,))
        change_tensors(result, self._note, path=(_RESULT,))
        known = {id(each) for each in self._objects}
        for each in objects_of(result):
            if id(each) not in known:
                self._complete(each)

    def _find(self, attribute: str | None) -> CachedTokens | CachedHeads:
        found = self._declared.tensors.get(attribute or "")
        if found is None:
            raise PlanFault(f"the plan does not declare the tensors {attribute} of {self._declared.argument}")
        return found

    def _take(self, path: Path, attribute: str | None, tensor: torch.Tensor) -> torch.Tensor:
        declared, cut = self._find(attribute), self._shares.find(tensor)
        dim = _dim_of(declared, tensor, attribute)
        size = self._shares.shape_of(tensor)[dim]
        stream = self._stream(declared, size, attribute)
        if stream is None:
            if cut is not None:
                raise PlanFault(f"workers have shares of {attribute}, and not of the heads")
            return tensor
        if cut is None:
            tensor = self._shares.take(tensor, dim, stream, self._forward.ranks.rank)
            cut = Cut(dim, (stream,))
        elif cut.dim != dim or (isinstance(declared, CachedHeads) and cut.parts != (stream,)):
            raise PlanFault(f"workers have shares of {attribute} along another dimension")
        self._before[path] = cut
        return tensor

    def _stream(self, declared: CachedTokens | CachedHeads, size: int, attribute: str | None) -> Stream | None:
        """Return how ranks share the tokens or heads of a tensor."""
        if isinstance(declared, CachedHeads):
            stream = self._share_heads(declared.projection)
            if stream is not None and size != stream.tokens:
                raise PlanFault(f"{attribute} has {size} heads, {declared.projection} has {stream.tokens}")
            return stream
        if 0 < size < self._forward.ranks.size:
            raise PlanFault(f"{size} tokens of {attribute} are fewer than {self._forward.ranks.size} workers")
        return Stream.of(size, self._forward.ranks.size)

    def _read(self, _: Path, attribute: str | None, tensor: torch.Tensor) -> torch.Tensor:
        """Let attentions know the tokens that are in the cache."""
        declared, cut = self._find(attribute), self._shares.find(tensor)
        if isinstance(declared, CachedTokens) and declared.read is not None and cut is not None:
            if declared.read in self._forward.streams:
                raise PlanFault(f"tokens of {declared.read} are in the call, and in its cache as well")
            known = self._forward.cached.setdefault(declared.read, cut.parts)
            if known != cut.parts:
                raise PlanFault(f"the tensors {attribute} of {self._declared.argument} have different tokens")
        return tensor

    def _note(self, path: Path, attribute: str | None, tensor: torch.Tensor) -> torch.Tensor:
        """Note what a tensor is that the class has put into a cache."""
        if attribute is None or self._shares.find(tensor) is not None:
            return tensor
        declared = self._find(attribute)
        dim = _dim_of(declared, tensor, attribute)
        own = tensor.shape[dim]
        if isinstance(declared, CachedHeads):
            heads = self._share_heads(declared.projection)
            parts: tuple[Stream, ...] = () if heads is None else (heads,)
            found = [parts]
        else:
            streams = self._forward.streams
            parts = tuple(streams[name] for name in declared.written if name in streams and streams[name].tokens)
            before = self._before.get(path)
            found = [parts, *([(*before.parts, *parts)] if before is not None else ())]
        if found == [()]:
            if isinstance(declared, CachedHeads):
                return tensor
            raise PlanFault(f"the class writes to {attribute}, where the plan has no tokens")
        rank = self._forward.ranks.rank
        for each in found:
            cut = Cut(dim, each)
            if each and cut.counts[rank] == own:
                self._shares.note(tensor, cut)
                return tensor
        expected = " or ".join(str(Cut(dim, each).counts[rank]) for each in found if each)
        raise PlanFault(f"the class writes {own} tokens or heads to {attribute}, this worker has {expected}")

    def _complete(self, made: Any) -> None:
        """Give an object that the class has made the numbers of tokens of all ranks."""
        for attribute, name in self._declared.counts.items():
            stream = self._forward.streams.get(name)
            if stream is None or not hasattr(made, attribute):
                continue
            if getattr(made, attribute) != stream.counts[self._forward.ranks.rank]:
                raise PlanFault(f"{attribute} is {getattr(made, attribute)}, which is not this worker's part of {name}")
            setattr(made, attribute, stream.tokens)


def _dim_of(declared: CachedTokens | CachedHeads, tensor: torch.Tensor, attribute: str | None) -> int:
    dim = declared.dim + tensor.ndim if declared.dim < 0 else declared.dim
    if not 0 <= dim < tensor.ndim:
        raise PlanFault(f"{attribute} has the shape {list(tensor.shape)}, its entries are in dimension {declared.dim}")
    return dim
