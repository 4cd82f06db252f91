"""Partition the tokens of text and image, or of one sequence, over ranks, and gather them.

Keys are gathered by rank, [text 0, image 0, text 1, image 1, ...]; their order changes attention only by rounding. All
padding is at the end of the last rank's tokens, where it can be cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from xfuser.core.distributed import get_sp_group

from xditd.ipc.errors import Unsupported


@dataclass(frozen=True, slots=True)
class RankTokens:
    """One rank's tokens: ranges of the whole text and image, and the padding after its image tokens."""

    text: slice
    image: slice
    padding: int

    @property
    def image_tokens(self) -> int:
        return int(self.image.stop - self.image.start)


def partition_tokens(text: int, image: int, ranks: int) -> tuple[RankTokens, ...]:
    """Partition ``text`` and ``image`` tokens so that each rank gets equally many in total, with padding.

    Raises:
        Unsupported: fewer text or image tokens than ranks, or more padding than the last rank can have.
    """
    each = -(-(text + image) // ranks)
    padding = each * ranks - text - image
    partition: list[RankTokens] = []
    text_at = image_at = 0
    for rank in range(ranks):
        own_text = text // ranks + (rank < text % ranks)
        pad = padding if rank == ranks - 1 else 0
        own_image = each - own_text - pad
        if text < ranks or image < ranks or own_image < 0:
            raise Unsupported(
                f"{text} text and {image} image tokens are too few to split over {ranks} workers: "
                "use a larger image, a longer prompt or fewer workers"
            )
        partition.append(RankTokens(slice(text_at, text_at + own_text), slice(image_at, image_at + own_image), pad))
        text_at += own_text
        image_at += own_image
    return tuple(partition)


@dataclass(frozen=True, slots=True)
class RankRange:
    """One rank's tokens of one sequence, and the padding after them."""

    tokens: slice
    padding: int

    @property
    def count(self) -> int:
        return int(self.tokens.stop - self.tokens.start)


def partition_evenly(tokens: int, ranks: int, what: str = "tokens") -> tuple[RankRange, ...]:
    """Partition the tokens of one sequence, equally many for each rank; the last rank has all padding.

    Raises:
        Unsupported: the last rank would have no token.
    """
    each = -(-tokens // ranks)
    if each * (ranks - 1) >= tokens:
        raise Unsupported(
            f"{tokens} {what} are too few to split over {ranks} workers: use more of them, or fewer workers"
        )
    ends = [min(each * (rank + 1), tokens) for rank in range(ranks)]
    return tuple(RankRange(slice(each * rank, end), each * (rank + 1) - end) for rank, end in enumerate(ends))


def gather_evenly(own: torch.Tensor, tokens: int) -> torch.Tensor:
    """Gather every rank's padded (batch, tokens, ...) of :func:`partition_evenly`; return the first ``tokens``."""
    return get_sp_group().all_gather(own, dim=1)[:, :tokens]


def pad_end(tensor: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Append ``count`` zeros along a dimension: a copy, or the tensor itself if there are none."""
    if count == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def gather(sample: torch.Tensor, partition: tuple[RankTokens, ...]) -> torch.Tensor:
    """Gather every rank's image tokens; all_gather needs equal lengths, so shorter ones are padded."""
    if len(partition) == 1:
        return sample
    longest = max(part.image_tokens + part.padding for part in partition)
    sample = pad_end(sample, longest - sample.shape[1], dim=1)
    gathered = get_sp_group().all_gather(sample, dim=1).unflatten(1, (len(partition), longest))
    return torch.cat([gathered[:, rank, : part.image_tokens] for rank, part in enumerate(partition)], dim=1)
