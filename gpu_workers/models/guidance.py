"""Guidance by two predictions (classifier-free): the texts that it needs, and how it combines the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xditd.ipc.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Guidance:
    """``negative + scale * (positive - negative)``, with a scale above 1; otherwise there is one prediction.

    With ``keeps_norms``, each token of the combined prediction gets the norm of that of its positive one.
    """

    scale: float
    keeps_norms: bool = False

    @property
    def is_on(self) -> bool:
        """Whether a step has two predictions."""
        return self.scale > 1

    def combine(self, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combine the predictions of the positive and of the negative texts, (rows, tokens, channels) each."""
        if not self.is_on:
            (only,) = predictions
            return only
        positive, negative = predictions
        combined = negative + self.scale * (positive - negative)
        if not self.keeps_norms:
            return combined
        wanted = torch.norm(positive, dim=-1, keepdim=True)
        return combined * (wanted / torch.norm(combined, dim=-1, keepdim=True))


def texts_for(guidance: Guidance, conditioning: Mapping[str, Any], positive: str, negative: str) -> dict[str, Any]:
    """Return the conditioning ``positive`` by name, and ``negative`` if the guidance needs it.

    Raises:
        BadRequest: ``negative`` is missing, or would have no effect.
    """
    given = conditioning.get(negative)
    if guidance.is_on and given is None:
        raise BadRequest(
            f"{negative} is missing: guidance_scale {guidance.scale:g} needs one for each image; give it, or use "
            "guidance_scale 1 for none"
        )
    if not guidance.is_on and given is not None:
        raise BadRequest(
            f"{negative} with guidance_scale {guidance.scale:g} would have no effect: leave it out, or guide with more "
            "than 1"
        )
    return {positive: conditioning[positive]} | ({negative: given} if guidance.is_on else {})
