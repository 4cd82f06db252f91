"""The step cache (ParaAttention's "first block cache"): skip all blocks but the first if a step changes little. Lossy.

The first block always runs. Its residual is compared with that of the last computed step: the relative difference of
means over the image tokens of all ranks. Up to the threshold, the residual of the other blocks is reused.

diffusers' hook for that (``apply_first_block_cache``) takes the same decisions for a batch of one image: means and
their quotient are of the residuals' dtype. It decides on each rank alone, and ranks that decide differently deadlock.
xfuser's keeps its state on GPU 0 for every rank, and averages the means of unequal shares. Neither works with fused
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xditd.gpu_workers.parallel.rank_sync import sum_over_ranks


@dataclass(slots=True)
class _CachedStep:
    """The residuals of one image at its last computed step: of the first block, and of all others."""

    first: torch.Tensor
    rest: torch.Tensor | None = None


class StepCache:
    """The cache of one job. Ranks that share images make the same calls in the same order, each with its own tokens.

    ``threshold``, above 0, is the greatest relative difference at which a step reuses the residual.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._steps: dict[int, _CachedStep] = {}
        self.reused = 0
        """How many steps were reused so far, counted for each image."""

    def decide(self, images: range, first: torch.Tensor) -> list[bool]:
        """Return for each image of the batch whether to call :meth:`reuse`; else :meth:`keep` must follow.

        ``first`` is the residual of the first block, (images, tokens, hidden), for this rank's image tokens.
        """
        from xfuser.core.distributed import get_sp_group  # importable only after xfuser_start

        # `known` and `totals` are the same on every rank.
        known = [number for number in images if number in self._steps]
        can_reuse = dict.fromkeys(images, False)
        if known:
            sums = [self._compare(self._steps[number].first, first[images.index(number)]) for number in known]
            own = torch.nn.functional.pad(torch.stack(sums).cpu().double(), (0, 1), value=first[0].numel())
            for number, total in zip(known, sum_over_ranks(own, get_sp_group().cpu_group), strict=True):
                difference, size = (total[:2] / total[2]).to(first.dtype)
                can_reuse[number] = (difference / size).item() <= self._threshold  # False for NaN
        for number, is_reused in can_reuse.items():
            if is_reused:
                self.reused += 1
            else:
                self._steps[number] = _CachedStep(first[images.index(number)])
        return [can_reuse[number] for number in images]

    def keep(self, image: int, rest: torch.Tensor) -> None:
        """Store the residual of the other blocks for an image at this step."""
        self._steps[image].rest = rest

    def reuse(self, image: int) -> torch.Tensor:
        """Return the residual of the other blocks at the last computed step."""
        rest = self._steps[image].rest
        assert rest is not None  # decide() returns True only after keep()
        return rest

    def forget(self) -> None:
        """Clear the cache, so that the next step is computed."""
        self._steps.clear()

    @staticmethod
    def _compare(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """Return the sums of the absolute difference and of ``before``: (2,) in float32."""
        return torch.stack([(now - before).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])


class ImageCache:
    """The cache of one image at one step, for blocks that change its tokens in place."""

    def __init__(self, cache: StepCache, image: int) -> None:
        self._cache = cache
        self._image = image
        self._before = torch.empty(0)

    def begin(self, tokens: torch.Tensor) -> None:
        """Store the input of the first block, (tokens, hidden)."""
        self._before = tokens.clone()

    def try_reuse(self, tokens: torch.Tensor) -> bool:
        """Take the output of the first block. If the step is reused, add the stored residual and return ``True``."""
        (is_reused,) = self._cache.decide(range(self._image, self._image + 1), (tokens - self._before).unsqueeze(0))
        if is_reused:
            tokens += self._cache.reuse(self._image)
        else:
            self._before.copy_(tokens)
        return is_reused

    def end(self, tokens: torch.Tensor) -> None:
        """Store the residual from the output of the last block."""
        self._cache.keep(self._image, tokens - self._before)
