"""Split the tokens of a sequence over ranks, and gather them: any count, each rank's tokens in the order of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from xditd.gpu_workers.parallel.peer_exchange import PeerExchange


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that share the tokens of a forward: their process group, and this process's place in it."""

    group: dist.ProcessGroup | None
    """``None``: all ranks of the default group."""
    rank: int
    size: int
    meet: Callable[[object], None] | None = None
    """Called before each collective with what all ranks know of it; raises on all of them if they know other things.
    Without it, a rank that has raised, or sends something else, makes the others wait."""
    peers: PeerExchange | None = None
    """Where GPUs write to each other's memory."""

    @classmethod
    def all(cls) -> Ranks:
        """Return all ranks of the default group; this process alone where there is none."""
        return cls(None, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(None, 0, 1)


@dataclass(frozen=True, slots=True)
class Stream:
    """How many consecutive tokens of one sequence each rank has."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, ranks: int) -> Stream:
        """Split ``tokens`` as evenly as possible: the first ranks have one more than the last."""
        return cls(tuple(tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)))

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def own(self, rank: int) -> slice:
        """Return the tokens of one rank."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def count(self, tokens: int, of_last: bool, rank: int) -> int:
        """Return how many of the first ``tokens``, or of the last ones, are a rank's."""
        own = self.own(rank)
        first, last = (self.tokens - tokens, self.tokens) if of_last else (0, tokens)
        return max(0, min(own.stop, last) - max(own.start, first))


def take(tensor: torch.Tensor, dim: int, stream: Stream, rank: int) -> torch.Tensor:
    """Return a rank's tokens of a whole tensor, as a view."""
    own = stream.own(rank)
    return tensor.narrow(dim, own.start, own.stop - own.start)


def gather(own: torch.Tensor, dim: int, counts: tuple[int, ...], ranks: Ranks) -> torch.Tensor:
    """Gather the tokens of all ranks along ``dim``, in the order of ranks; every rank gets the same tensor.

    ``counts`` is how many tokens each rank gives. All ranks call this together. The result is contiguous, since a
    class may view it in another shape.
    """
    sent = own.movedim(dim, 0).contiguous()
    if ranks.meet is not None:
        ranks.meet(("gather", counts, tuple(sent.shape[1:]), sent.dtype))
    longest = max(counts)
    if sent.shape[0] < longest:  # a collective takes equal parts
        sent = torch.cat([sent, sent.new_zeros((longest - sent.shape[0], *sent.shape[1:]))])
    # As bytes: not every backend has every dtype.
    received = sent.new_empty((ranks.size * longest, *sent.shape[1:]))
    dist.all_gather_into_tensor(_bytes_of(received), _bytes_of(sent), group=ranks.group)
    if min(counts) < longest:
        parts = received.unflatten(0, (ranks.size, longest))
        received = torch.cat([parts[rank, :count] for rank, count in enumerate(counts)])
    return received.movedim(0, dim).contiguous()


def exchange(
    packed: torch.Tensor, sent: Sequence[int], received: Sequence[int], ranks: Ranks, what: object
) -> torch.Tensor:
    """Send each rank its part of a contiguous tensor; return what ranks sent to this one, flat, in the order of ranks.

    ``sent`` and ``received`` are the elements to and from each rank; ``what`` says the same on all ranks. All ranks
    call this together.
    """
    if ranks.meet is not None:
        ranks.meet(("exchange", what, packed.dtype))
    arrived = packed.new_empty(sum(received))
    item = packed.element_size()
    dist.all_to_all_single(
        _bytes_of(arrived),
        _bytes_of(packed),
        [size * item for size in received],
        [size * item for size in sent],
        group=ranks.group,
    )
    return arrived


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
