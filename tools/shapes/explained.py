"""How much of drawn objects the words explain to a model: a figure that shows places and bindings being learned."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

import torch
from diffusers import AutoencoderKL

from shapes.draw import draw, encode
from shapes.pool import autocast, covered_patches, encode_latents, pack
from shapes.scenes import MAX_OBJECTS
from shapes.text_tokens import tokens
from shapes.words import LANGUAGES, sample_request

if TYPE_CHECKING:
    from shapes.flow_training import Flow

PICTURES: Final = 64
"""For each number of objects."""
_SEED: Final = 9_000_000


class Explained:
    """Pictures with sentences that name every object's place, which training has not seen."""

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self._device = device
        self._empty = tuple(each.expand(PICTURES, -1).to(device) for each in tokens([""]))
        self._groups: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]] = {}
        for objects in range(1, MAX_OBJECTS + 1):
            rng = Random(_SEED + objects)
            requests = [
                sample_request(rng, objects=objects, language=LANGUAGES[at % 2], style="places")
                for at in range(PICTURES)
            ]
            scenes = encode([each.scene for each in requests])
            latents = pack(encode_latents(vae, draw(scenes, device)))
            words = tuple(each.to(device) for each in tokens([each.text for each in requests]))
            self._groups[objects] = latents, words, covered_patches(scenes).float().to(device)

    @torch.no_grad()
    def __call__(self, flow: Flow) -> dict[int, float]:
        """Return, by number of objects, the share of the error in patches with objects that words take away.

        The model sees nothing but noise, so all that it knows of a picture is its sentence: 0 if the words say nothing
        to it, at most somewhat below 1, as sentences leave sizes and backgrounds open.
        """
        generator = torch.Generator(self._device).manual_seed(_SEED)
        found = {}
        for objects, (latents, words, covered) in self._groups.items():
            noise = torch.randn(latents.shape, generator=generator, device=self._device)
            ones = torch.ones(PICTURES, device=self._device)
            errors = []
            for clip, t5 in (words, self._empty):
                with autocast(self._device):
                    velocity = flow(noise, ones, ones, clip, t5).float()
                error = (noise - velocity - latents).square().mean(-1)
                errors.append(float((error * covered).sum()))
            found[objects] = 1 - errors[0] / errors[1]
        return found
