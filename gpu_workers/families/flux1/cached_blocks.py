"""The unmodified blocks of FLUX.1 with a step cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from xditd.gpu_workers.models.step_cache import StepCache


class CachedBlocks(torch.nn.Module):
    """A block that runs all blocks of a transformer, with a step cache after the first.

    Arguments and results are those of diffusers' double block.
    """

    def __init__(self, double: torch.nn.ModuleList, single: torch.nn.ModuleList, cache: StepCache) -> None:
        super().__init__()
        self._first = cast(Callable[..., Any], double[0])
        self._others = [*double[1:], *single]
        self._cache = cache

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text, image = self._first(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb, **others
        )
        images = range(image.shape[0])
        can_reuse = self._cache.decide(images, image - hidden_states)
        results = list(image.unbind(0))
        rows = [number for number in images if not can_reuse[number]]
        if rows:
            done_text, done = text[rows], image[rows]
            for block in self._others:
                done_text, done = block(hidden_states=done, encoder_hidden_states=done_text, temb=temb[rows], **others)
            for number, result in zip(rows, done.unbind(0), strict=True):
                self._cache.keep(number, result - image[number])
                results[number] = result
        for number in images:
            if can_reuse[number]:
                results[number] = image[number] + self._cache.reuse(number)
        return text, torch.stack(results)  # nothing reads the text after the last block
