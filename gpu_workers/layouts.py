"""How one model is split over the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The split that all skeletons of this process share, fixed when the group starts.

    ``attention_backend`` is xDiT's name for what ``auto`` or the configuration came to; ``fused_attention``
    what fused transformers attend with, ``None`` where transformers run plain.
    """

    rank: int
    world_size: int
    ulysses_degree: int
    device: torch.device
    attention_backend: str
    fused_attention: str | None = None

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees by name, as status and reports show them."""
        return {"ulysses": self.ulysses_degree}
