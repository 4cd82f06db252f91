"""The parallel layout of a group or of one component, as one rank sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xditd.ipc.degrees import Degrees
from xditd.ipc.settings.daemon import WORKER_DEFAULTS, NativeProducts


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The layout of this process's group, or of one component in it (:mod:`component_layouts`).

    All components run on the same ranks, of which ``degrees.sequence`` share the tokens of an image; each has its own
    Ulysses and ring degrees. :class:`Degrees` says how ranks are numbered. ``attention_backend`` is xDiT's name of the
    chosen backend; ``fused_attention`` is that of fused transformers, ``None`` if they run plain modules. ``precision``
    is that of matrix products: ``bf16`` for the lent weights themselves, or ``fp8``. ``requested_attention`` and
    ``requested_kernels`` are the settings, which may be ``auto``; so are ``acceleration``, of modules that run as their
    class, and ``native_products``, of packed weights.
    """

    rank: int
    degrees: Degrees
    device: torch.device
    attention_backend: str
    fused_attention: str | None = None
    precision: str = WORKER_DEFAULTS.precision
    requested_attention: str = WORKER_DEFAULTS.attention_backend
    requested_kernels: str = WORKER_DEFAULTS.kernels
    acceleration: str = WORKER_DEFAULTS.acceleration
    native_products: NativeProducts = WORKER_DEFAULTS.native_products

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
