"""Training data made ahead: scenes with the tokens of their sentences, and latents of their pictures on the GPU."""

from __future__ import annotations

import time
from typing import Final

import torch
from diffusers import AutoencoderKL

from shapes.chunks import chunks
from shapes.draw import FIELDS, draw
from shapes.models import LATENT_SCALE, LATENT_SHIFT
from shapes.scenes import MAX_OBJECTS
from shapes.text_tokens import CLIP_TOKENS, T5_TOKENS

PATCHES: Final = 16
"""Image tokens on each side of a picture."""


class Sentences:
    """Tokens and scenes of ``slots * size`` sentences on ``device``; :meth:`refresh` replaces the oldest chunk."""

    waited_s: float
    """How long sentences have been waited for."""

    def __init__(self, device: torch.device, *, seed: int, slots: int, size: int, workers: int, first: int = 0) -> None:
        """Fill with the ``slots`` chunks from number ``first`` on."""
        count = slots * size
        self._device, self._size, self._slots, self._next = device, size, slots, first
        self.clip = torch.zeros(count, CLIP_TOKENS, dtype=torch.int32, device=device)
        self.t5 = torch.zeros(count, T5_TOKENS, dtype=torch.int32, device=device)
        self.scenes = torch.zeros(count, MAX_OBJECTS + 1, FIELDS, device=device)
        self._chunks = chunks(seed, first, size, workers)
        self.waited_s = 0.0
        for _ in range(slots):
            self.refresh()

    def refresh(self) -> None:
        """Replace the oldest chunk by a new one."""
        started = time.monotonic()
        made = next(self._chunks)
        self.waited_s += time.monotonic() - started
        self._replace(*made)

    def sentences(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Choose sentences: CLIP's tokens, T5's tokens, and their scenes as :func:`~shapes.draw.encode` writes them."""
        chosen = torch.randint(len(self.clip), (count,), generator=generator, device=self._device)
        return self.clip[chosen], self.t5[chosen], self.scenes[chosen]

    def _replace(self, scenes: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor) -> slice:
        at = self._next % self._slots * self._size
        self._next += 1
        here = slice(at, at + self._size)
        for kept, given in ((self.scenes, scenes), (self.clip, clip), (self.t5, t5)):
            kept[here] = given.to(self._device, non_blocking=True)
        return here


class Pool(Sentences):
    """Sentences with the latents of their pictures.

    Pictures are drawn and encoded once and trained on several times, each time with other noise.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        device: torch.device,
        *,
        seed: int,
        slots: int,
        size: int,
        workers: int,
        first: int = 0,
        outline: float = 0.0,
    ) -> None:
        """Fill the pool as :class:`Sentences` does; ``outline`` is as for ``draw``."""
        count = slots * size
        self._vae, self._outline = vae, outline
        self.latents = torch.zeros(count, 16, 2 * PATCHES, 2 * PATCHES, dtype=torch.float16, device=device)
        self.covered = torch.zeros(count, PATCHES**2, dtype=torch.float16, device=device)
        super().__init__(device, seed=seed, slots=slots, size=size, workers=workers, first=first)

    def batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Choose pictures: packed latents (count, 256, 64) float32, CLIP's tokens, T5's tokens, and which patches
        objects cover, (count, 256) float32."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator, device=self._device)
        latents = pack(self.latents[chosen].float())
        return latents, self.clip[chosen], self.t5[chosen], self.covered[chosen].float()

    def _replace(self, scenes: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor) -> slice:
        here = super()._replace(scenes, clip, t5)
        images = draw(scenes, self._device, outline=self._outline)
        self.latents[here] = encode_latents(self._vae, images).to(torch.float16)
        self.covered[here] = covered_patches(self.scenes[here]).to(torch.float16)
        return here


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode pictures to latents as the transformer sees them, (pictures, 16, 32, 32)."""
    with autocast(images.device):
        images = images.to(memory_format=torch.channels_last)
        mode = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(128)])
    return (mode.float() - LATENT_SHIFT) * LATENT_SCALE


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 on a GPU, in float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def prepare_gpu() -> None:
    """Set torch up for training on a GPU.

    cuDNN's attention ends in an illegal access in its backward pass at odd numbers of tokens. On the CPU, pictures are
    read: small operations, in which threads wait for each other (two trainings beside each other on 32 cores read a
    picture in 0.8 s in place of 0.02).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(1)


def covered_patches(rows: torch.Tensor) -> torch.Tensor:
    """Say which patches the squares around objects touch, (scenes, 256) bool, row by row as :func:`pack` has them.

    ``rows`` are as :func:`~shapes.draw.encode` writes them.
    """
    middles = (torch.arange(PATCHES, device=rows.device) + 0.5) / PATCHES
    things = rows[:, :MAX_OBJECTS]
    x, y, r = (things[..., field, None] for field in (2, 3, 4))
    columns = (middles - x).abs() < r + 0.5 / PATCHES
    lines = (middles - y).abs() < r + 0.5 / PATCHES
    is_there = things[:, :, 0, None, None] >= 0
    return (is_there & lines[..., :, None] & columns[..., None, :]).any(1).flatten(1)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents to tokens as ``FluxPipeline`` does: (n, 16, 32, 32) to (n, 256, 64)."""
    parts = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
