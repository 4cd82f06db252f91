"""How one model is split over the ranks of a group, and where this rank stands in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xditd.ipc.degrees import Degrees
from xditd.ipc.settings.daemon import WORKER_DEFAULTS


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The split of this process's group, or that of one component in it (:mod:`component_layouts`).

    All have the same ranks, of which ``degrees.sequence`` share the tokens of an image; how these are split between
    Ulysses and ring is each component's own. Ranks count as :class:`Degrees` says: sequence groups are neighbours.
    ``attention_backend`` is xDiT's name for what ``auto`` or the configuration came to; ``fused_attention`` what fused
    transformers attend with, ``None`` where transformers run plain. ``precision`` is that of their products: ``bf16``
    for the weights as they were lent, or ``fp8``. ``requested_attention`` and ``requested_kernels`` are the operator's
    words, ``auto`` where the choice was left to us.
    """

    rank: int
    degrees: Degrees
    device: torch.device
    attention_backend: str
    fused_attention: str | None = None
    precision: str = WORKER_DEFAULTS.precision
    requested_attention: str = WORKER_DEFAULTS.attention_backend
    requested_kernels: str = WORKER_DEFAULTS.kernels

    @property
    def world_size(self) -> int:
        return self.degrees.world_size

    @property
    def sequence_rank(self) -> int:
        """Which share of an image's tokens this rank works on, from 0 to ``degrees.sequence - 1``."""
        return self.rank % self.degrees.sequence

    @property
    def half(self) -> int:
        """Which half of a batch's rows this rank works on; 0 where they are not split."""
        return self.rank // self.degrees.sequence
