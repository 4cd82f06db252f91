"""What the tests know of a tiny pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModularPipeline

Feature = Literal[
    "text-to-image",
    "image-to-image",
    "inpaint",
    "edit",
    "controlnet",
    "ip-adapter",
    "lora",
    "text-to-video",
    "image-to-video",
    "video-with-sound",
    "two-transformers",
    "modular",
    "kv-cache",
    "audio",
    "unet",
    "tiled-vae",
    "text-encoder",
    "callback",
    "interrupt",
    "output-type",
    "several-images",
    "from-pipe",
    "to",
    "step-cache",
    "changed-model",
]

Pipeline = DiffusionPipeline | ModularPipeline


@dataclass(frozen=True)
class PipelineEntry:
    """A tiny pipeline, and one call of it.

    ``build`` makes the pipeline of seeded float32 components on the CPU; two calls make equal pipelines that share
    nothing. ``run`` calls the pipeline for two or three steps with a generator that it seeds itself, and returns the
    results as a flat list of tensors; it leaves nothing in the pipeline that changes a second run. ``components`` names
    those components whose ``forward``, ``encode`` or ``decode`` the call uses.
    """

    name: str
    feature: Feature
    build: Callable[[], Pipeline]
    run: Callable[[Any], list[torch.Tensor]]
    components: tuple[str, ...]
