"""The keys and values of a whole image in the attention layers of one stage, renewed patch by patch."""

from __future__ import annotations

import torch


class KeyValues:
    """What the layers of a stage attend to during one job: fresh where the patch lies, from the step before elsewhere.

    Text is fresh in every turn. Memory: twice (batch, tokens, hidden) for each layer, until the object goes.
    """

    def __init__(self, text_tokens: int) -> None:
        self._text = text_tokens
        self._patch: slice | None = None
        self._kept: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def turn_to(self, patch: slice | None) -> None:
        """Take what comes next for these image tokens; ``None``: for the whole image, as the first turn has to."""
        self._patch = patch

    def renew(
        self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a turn's keys and values, (batch, text and patch tokens, heads, head size); return the whole image's.

        Those of the whole image are kept as they are and written into later: nothing else may hold on to them.
        """
        if self._patch is None:
            self._kept[layer] = (key, value)
            return key, value
        kept = self._kept[layer]
        image = slice(self._text + self._patch.start, self._text + self._patch.stop)
        for whole, fresh in zip(kept, (key, value), strict=True):
            whole[:, : self._text] = fresh[:, : self._text]
            whole[:, image] = fresh[:, self._text :]
        return kept
