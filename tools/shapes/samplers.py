"""Draw sentences of ``shapes``: with diffusers' pipeline, or with the workers of a daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FluxPipeline
from diffusers.utils import logging

from shapes.draw import PIXELS
from shapes.pool import PATCHES, pack
from shapes.text_tokens import T5_TOKENS

STEPS: Final = 20
GUIDANCE: Final = 3.5

Sampler = Callable[[Sequence[str], int], torch.Tensor]
"""From sentences and the seed of their noise to pictures, (sentences, 3, 256, 256) in [-1, 1]."""


def open_pipeline(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> FluxPipeline:
    """Open a pipeline's folder with diffusers, without progress bars."""
    logging.disable_progress_bar()
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_noise(pictures: int, seed: int) -> torch.Tensor:
    """Draw what diffusers' ``FluxPipeline`` draws in float32 from a CPU's generator, (pictures, 16, 32, 32).

    For pictures that are compared between dtypes: on some machines, what torch draws in bfloat16 is not this, rounded.
    """
    return torch.randn(pictures, 16, 2 * PATCHES, 2 * PATCHES, generator=torch.Generator().manual_seed(seed))


def pipeline_sampler(
    pipeline: object, *, steps: int = STEPS, guidance: float = GUIDANCE, text_tokens: int = T5_TOKENS
) -> Sampler:
    """Sample with diffusers' ``FluxPipeline``, from the noise of :func:`draw_noise`."""

    def sample(texts: Sequence[str], seed: int) -> torch.Tensor:
        result = pipeline(  # type: ignore[operator]
            list(texts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=PIXELS,
            width=PIXELS,
            max_sequence_length=text_tokens,
            latents=pack(draw_noise(len(texts), seed)),
            output_type="pt",
        )
        return result.images * 2 - 1

    return sample


def daemon_sampler(
    pipe: Any, *, steps: int = STEPS, guidance: float = GUIDANCE, text_tokens: int = T5_TOKENS, **more: Any
) -> Sampler:
    """Sample with ``xditd.client.Pipeline``, in the workers of a daemon.

    ``more`` goes to the pipeline's call.
    """

    def sample(texts: Sequence[str], seed: int) -> torch.Tensor:
        result = pipe(
            list(texts),
            steps=steps,
            guidance=guidance,
            height=PIXELS,
            width=PIXELS,
            seed=seed,
            max_sequence_length=text_tokens,
            **more,
        )
        return result.generation.image.float().cpu()

    return sample
