"""Generations of Wan for tests, with the arguments of jobs and of diffusers' pipelines."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import wan_models

from xditd.gpu_workers.families.wan.config import WanConfig
from xditd.gpu_workers.models.cached_model import CachedModel


@dataclasses.dataclass(frozen=True)
class VideoSample:
    """A generation; ``size`` is that of the latents. A subclass has ``conditioning``."""

    config: WanConfig = wan_models.TEXT
    scale: float = 5.0
    size: tuple[int, int, int] = (3, 4, 6)
    batch: int = 1
    steps: int = 3
    options: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def conditioning(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def noise_size(self) -> tuple[int, int, int]:
        """The size of the latents that the transformer computes."""
        return self.size

    @property
    def noise(self) -> torch.Tensor:
        shape = (self.batch, self.config.out_channels, *self.noise_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    @property
    def sides(self) -> dict[str, int]:
        frames, height, width = self.size
        pixels = self.config.pixels
        return {"frames": (frames - 1) * 4 + 1, "height": height * pixels, "width": width * pixels}


def generate(model: CachedModel, vae: CachedModel, sample: VideoSample, **more: Any) -> torch.Tensor:
    """Run a generation whose pictures the VAE encodes."""
    import direct_jobs  # not before the group is started

    return direct_jobs.generate_from(
        model,
        sample.conditioning | more.pop("conditioning", {}),
        more.pop("noise", sample.noise),
        vae=vae,
        steps=sample.steps,
        guidance_scale=sample.scale,
        options=sample.options,
        **sample.sides,
        **more,
    )
