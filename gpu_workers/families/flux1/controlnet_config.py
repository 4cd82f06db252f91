"""The sizes of a ControlNet for FLUX.1."""

from __future__ import annotations

from dataclasses import dataclass

from xditd.gpu_workers.families.flux1.config import Flux1Sizes

DOUBLE_RESIDUALS = "controlnet_block_samples"
SINGLE_RESIDUALS = "controlnet_single_block_samples"
"""Arguments of the transformer's class: lists of (rows, image tokens, channels)."""


@dataclass(frozen=True, slots=True)
class Flux1ControlNetConfig(Flux1Sizes):
    """The sizes of a ControlNet: blocks as those of the transformer, and a residual after each of them."""

    modes: int = 0
    """Kinds of pictures that a union ControlNet tells apart; 0: it is for one kind."""
    is_original: bool = False
    """Whether the tensors are named as in ComfyUI's module, and not as in diffusers' class."""

    @property
    def residuals(self) -> dict[str, int]:
        """How many residuals it gives, by the transformer's argument."""
        return {DOUBLE_RESIDUALS: self.double_blocks, SINGLE_RESIDUALS: self.single_blocks}
