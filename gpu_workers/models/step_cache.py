"""Steps that are like the one before: what all blocks but the first did there is used again. Not lossless.

The first block always runs. How much what it adds to the image tokens differs from what it added at the last step that
was computed, relative, as a sum over all of its tokens, whichever rank has them, decides about the other blocks. (The
idea is ParaAttention's "first block cache".)

diffusers' own hook for that (``apply_first_block_cache``) lets every rank decide for itself, and ranks that decide
differently wait for each other for good. xfuser's puts its state on GPU 0 for every rank, and averages means of unequal
shares. Neither reaches fused blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xditd.gpu_workers.parallel.rank_sync import sum_over_ranks


@dataclass(slots=True)
class _Kept:
    """Of one image at its last computed step: what the first block added to its tokens, and what all others did."""

    first: torch.Tensor
    rest: torch.Tensor | None = None


class StepCache:
    """The cache of one job. Ranks that share images make the same calls in the same order, each with its own tokens.

    ``threshold`` is above 0: a step whose first block differs by less is not computed to its end.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._kept: dict[int, _Kept] = {}
        self.reused = 0
        """Steps that were spared so far, counted for each image."""

    def decide(self, images: range, first: torch.Tensor) -> list[bool]:
        """Say for each image of the batch whether the rest can be had by :meth:`reuse`; else :meth:`keep` must follow.

        ``first`` is what the first block added to this rank's image tokens, (images, tokens, hidden).
        """
        from xfuser.core.distributed import get_sp_group  # not before xfuser_start has made xfuser importable

        # Which images are known is the same on every rank, and so is what is added up.
        known = [number for number in images if number in self._kept]
        verdicts = dict.fromkeys(images, False)
        if known:
            sums = [self._compare(self._kept[number].first, first[images.index(number)]) for number in known]
            totals = sum_over_ranks(torch.stack(sums).cpu().double(), get_sp_group().cpu_group)
            for number, (difference, size) in zip(known, totals.tolist(), strict=True):
                verdicts[number] = difference < self._threshold * size  # never where something is not a number
        for number, is_alike in verdicts.items():
            if is_alike:
                self.reused += 1
            else:
                self._kept[number] = _Kept(first[images.index(number)])
        return [verdicts[number] for number in images]

    def keep(self, image: int, rest: torch.Tensor) -> None:
        """Remember what the blocks behind the first added to the tokens of an image at this step."""
        self._kept[image].rest = rest

    def reuse(self, image: int) -> torch.Tensor:
        """Return what they added at the last step that was computed."""
        rest = self._kept[image].rest
        assert rest is not None  # decide() said yes after a keep()
        return rest

    def forget(self) -> None:
        """Compute the next step anew."""
        self._kept.clear()

    @staticmethod
    def _compare(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """Sum up the difference, and what it is relative to: (2,) in float32."""
        return torch.stack([(now - before).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])


class ImageCache:
    """The cache of one image, for blocks that change its tokens in place: one object for one step."""

    def __init__(self, cache: StepCache, image: int) -> None:
        self._cache = cache
        self._image = image
        self._before = torch.empty(0)

    def begin(self, tokens: torch.Tensor) -> None:
        """Note what the first block gets, (tokens, hidden)."""
        self._before = tokens.clone()

    def is_enough(self, tokens: torch.Tensor) -> bool:
        """Look at what the first block made of it; where that says so, add what the others would have, and end."""
        (is_alike,) = self._cache.decide(range(self._image, self._image + 1), (tokens - self._before).unsqueeze(0))
        if is_alike:
            tokens += self._cache.reuse(self._image)
        else:
            self._before.copy_(tokens)
        return is_alike

    def end(self, tokens: torch.Tensor) -> None:
        """Note what the last block made of it."""
        self._cache.keep(self._image, tokens - self._before)
