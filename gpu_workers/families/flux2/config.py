"""The sizes of a FLUX.2 transformer, and the constants of all of them.

Sources: diffusers, ``transformer_flux2.py`` and ``pipeline_flux2.py``, and the ``config.json`` and
``scheduler_config.json`` beside the weights of FLUX.2-dev and FLUX.2-klein.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

HEAD_SIZE: Final = 128
AXES: Final = (32, 32, 32, 32)
"""Channels of a head that are rotated by reference, row, column and place in the text."""
ROPE_THETA: Final = 2000
EPSILON: Final = 1e-6
MLP_RATIO: Final = 3
TIMESTEP_CHANNELS: Final = 256
MODULATIONS_DOUBLE: Final = 6
MODULATIONS_SINGLE: Final = 3

CHANNELS: Final = 128
"""Of a latent: 2x2 patches of the VAE's 32 channels, normalised."""
PIXELS_PER_LATENT: Final = 16

SCHEDULER: Final[Mapping[str, Any]] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True, slots=True)
class Flux2Config:
    """The sizes of a FLUX.2 transformer: dev has 8 + 48 blocks, klein 9B 8 + 24, klein 4B 5 + 20.

    dev has an embedder of the guidance scale, klein has none. klein's base and distilled weights have the same shapes.
    ``is_original``: the last modulation gives shift before scale, as in Black Forest Labs' and ComfyUI's files.
    """

    hidden: int
    double_blocks: int
    single_blocks: int
    context_channels: int
    has_guidance: bool
    is_original: bool = True

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_SIZE

    @property
    def mlp(self) -> int:
        return MLP_RATIO * self.hidden
