"""What a recipe and its run add that take pictures: those that the VAE encodes, and the image that steps start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from xditd.gpu_workers.models.operations import ConfigT_contra, Wanted


@runtime_checkable
class PictureRecipe(Protocol[ConfigT_contra]):
    """What a ``Recipe`` adds that takes pictures, which ``Generate`` encodes before ``start``."""

    def pictures(
        self, config: ConfigT_contra, wanted: Wanted, conditioning: Mapping[str, Any]
    ) -> Mapping[str, torch.Tensor]:
        """Check the pictures, and return those that the VAE encodes, (batch, channels, frames, height, width) each.

        Names are those of the conditioning, or others of the family's own. ``start`` gets the float32 latents under
        these names, in place of what the client gave.

        Raises:
            BadRequest: a wrong size or number of pictures; names it and what is accepted.
        """

    def noise_frames(self, wanted: Wanted, conditioning: Mapping[str, Any]) -> int:
        """Return the frames of the noise: more than those of the video if latents before it are denoised, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Pictures of a generation of which the VAE gives a sample of its distribution, as diffusers' pipelines ask for.

    They are (rows, channels, height, width) each, by the name under which ``start`` gets their latents: ``before`` the
    noise is drawn, or ``after``. ``skipped`` rows are drawn before the noise, too, of a picture that has no effect.
    """

    before: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skipped: int = 0
    after: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.before, *self.after]


@runtime_checkable
class SampledRecipe(Protocol[ConfigT_contra]):
    """What a ``Recipe`` adds whose pictures are samples of the VAE's distribution; its mode, with given noise."""

    def sampled(self, config: ConfigT_contra, wanted: Wanted, conditioning: Mapping[str, Any]) -> Sampled:
        """Check the pictures, and return them.

        Raises:
            BadRequest: a wrong size or number of pictures, or both a picture and its latents; names it.
        """


@runtime_checkable
class StartRecipe(Protocol):
    """What a ``Recipe`` adds whose pipelines draw another noise where steps start from an image."""

    def start_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        """Return the dtype of the noise and of the image's latents, for a VAE of ``dtype``."""


@runtime_checkable
class StartedRun(Protocol):
    """What a ``DenoisingRun`` adds that may start from an image."""

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents in the shape of the facts' latents, any number of channels, as steps take them."""


def whole_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return 1 where a mask is at least 0.5 and else 0, as the inpaint pipelines of diffusers take each mask."""
    return (mask >= 0.5).to(mask.dtype)
