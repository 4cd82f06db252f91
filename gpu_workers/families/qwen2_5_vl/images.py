"""Images in texts, as transformers' processor describes them: checks, and the positions of their tokens.

Source: transformers 5, ``Qwen2_5_VLModel.get_rope_index``; a test compares every position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch

from xditd.gpu_workers.families.qwen2_5_vl.config import IMAGE_TOKEN, MERGE
from xditd.gpu_workers.models.decoders import check_image_tokens
from xditd.ipc.errors import BadRequest

PIXELS: Final = "pixel_values"
GRIDS: Final = "image_grid_thw"
TYPES: Final = "mm_token_type_ids"

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True, eq=False)
class ImagesInTexts:
    """The images of a batch of texts in order: their sizes in tokens, and which tokens are theirs, (batch, tokens)."""

    grids: tuple[Grid, ...]
    is_image: torch.Tensor
    has_own_positions: bool
    """Whether their tokens have positions on three axes; else those of a text."""

    @classmethod
    def of(
        cls, images: Mapping[str, torch.Tensor], token_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> ImagesInTexts:
        """Check the arguments of images against each other and against the tokens.

        Raises:
            BadRequest: names the argument, its value and what is accepted.
        """
        pixels, sizes, types = images[PIXELS], images[GRIDS], images.get(TYPES)
        if not pixels.is_floating_point():
            raise BadRequest(f"images.{PIXELS}: dtype is {_name(pixels.dtype)}, use a floating dtype")
        if sizes.dtype != torch.int64:
            raise BadRequest(f"images.{GRIDS}: dtype is {_name(sizes.dtype)}, use int64")
        for number, (frames, rows, columns) in enumerate(sizes.tolist()):
            if frames != 1 or min(rows, columns) < MERGE or rows % MERGE or columns % MERGE:
                raise BadRequest(
                    f"images.{GRIDS}[{number}]: {[frames, rows, columns]}, use 1, as images are no videos, and "
                    f"multiples of {MERGE}"
                )
        patches = sum(rows * columns for _, rows, columns in sizes.tolist())
        if patches != len(pixels):
            raise BadRequest(f"images.{PIXELS}: {len(pixels)} patches, but {GRIDS} are {patches} patches")
        is_image = token_ids == IMAGE_TOKEN
        check_image_tokens(is_image, patches // MERGE**2, IMAGE_TOKEN)
        if mask is not None and bool((is_image & (mask == 0)).any()):
            raise BadRequest("mask: it leaves out tokens of images; give 1 for them")
        found = cls(
            tuple((rows // MERGE, columns // MERGE) for _, rows, columns in sizes.tolist()), is_image, types is not None
        )
        if types is not None:
            found._check_types(types)
        return found

    def _check_types(self, types: torch.Tensor) -> None:
        if types.shape != self.is_image.shape or not torch.equal(types, self.is_image.to(types.dtype)):
            raise BadRequest(
                f"images.{TYPES}: use {list(self.is_image.shape)}, 1 where token_ids are {IMAGE_TOKEN} and 0 elsewhere"
            )
        runs = [len(list(run)) for row in self.is_image.tolist() for is_image, run in groupby(row) if is_image]
        if runs != [math.prod(grid) for grid in self.grids]:
            raise BadRequest(
                f"images.{TYPES}: images of {[math.prod(grid) for grid in self.grids]} tokens, but they follow each "
                f"other in token_ids in runs of {runs}"
            )

    def positions(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Return the positions of all tokens by image, row and column, (3, batch, tokens); ``None``: those of a text.

        Tokens of an image have that of the token before, plus their place in it; the text goes on behind the longest
        side. Tokens that ``mask`` leaves out are not counted, and are at 0.
        """
        if not self.has_own_positions:
            return None
        grids = iter(self.grids)
        found = torch.zeros(3, *self.is_image.shape, dtype=torch.int64)
        for row, flags in enumerate(self.is_image):
            counted = torch.ones_like(flags) if mask is None else mask[row].bool()
            start, parts = 0, []
            for is_image, run in groupby(flags[counted].tolist()):
                count = len(list(run))
                if is_image:
                    rows, columns = next(grids)
                    down, right = torch.arange(rows), torch.arange(columns)
                    parts.append(torch.stack(torch.meshgrid(torch.zeros(1).long(), down, right, indexing="ij")))
                    parts[-1] = parts[-1].reshape(3, -1) + start
                    start += max(rows, columns)
                else:
                    parts.append(torch.arange(start, start + count).expand(3, -1))
                    start += count
            found[:, row, counted] = torch.cat(parts, dim=1)
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
