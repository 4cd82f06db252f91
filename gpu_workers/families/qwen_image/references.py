"""References of a generation: latents of other images, whose tokens follow those of the image in every forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import QwenImagePipeline

from xditd.gpu_workers.families.qwen_image.config import LATENT_CHANNELS, PATCH, PIXELS_PER_LATENT
from xditd.gpu_workers.families.qwen_image.facts import REFERENCES
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_SIDE_PIXELS

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class References:
    """The references by name, (16, height, width) each, of any even sizes. All rows of a batch have the same ones."""

    named: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, given: Any) -> References:
        """Check references.

        Raises:
            BadRequest: no list, or a wrong shape; names the reference.
        """
        if given is None:
            return cls({})
        if not isinstance(given, (list, tuple)) or not given:
            raise BadRequest(f"{REFERENCES}: {type(given).__name__} where a list is needed, with a tensor for each")
        named = {f"{REFERENCES}[{number}]": each for number, each in enumerate(given)}
        most = MAX_SIDE_PIXELS // PIXELS_PER_LATENT
        for name, each in named.items():
            check_shape(name, each, (LATENT_CHANNELS, None, None))
            if any(side % PATCH or side > most for side in each.shape[1:]):
                raise BadRequest(
                    f"{name}: shape is {list(each.shape)}, use multiples of {PATCH} up to {most} on a side"
                )
        return cls(named)

    @property
    def sizes(self) -> list[Size]:
        """The size of each as the class takes it: frames, rows and columns of tokens."""
        return [(1, each.shape[1] // PATCH, each.shape[2] // PATCH) for each in self.named.values()]


def packed(references: Sequence[torch.Tensor], batch: int) -> torch.Tensor | None:
    """Return the tokens of references that are on the device, (batch, tokens, 64); ``None`` without any."""
    if not references:
        return None
    tokens = [QwenImagePipeline._pack_latents(each[None], 1, *each.shape) for each in references]
    return torch.cat(tokens, dim=1).repeat(batch, 1, 1)
