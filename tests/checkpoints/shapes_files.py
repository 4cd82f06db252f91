"""``models/shapes`` for tests: its folder, also in float32, plain diffusers' pictures, and what pictures show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from shapes.judged_formats import write_folder_as
from shapes.models import build_parts, write_folder
from shapes.reading import read
from shapes.samplers import GUIDANCE, pipeline_sampler
from shapes.text_tokens import T5_TOKENS

from xditd.client.demo.shapes_model import SENTENCES, find_shapes

STEPS: Final = 8
TEXTS: Final = (SENTENCES[0].text, SENTENCES[1].text)
"""An English and a Chinese one."""
SEED: Final = 21
"""Of the noise; the pictures that it makes are clear, so that rounding changes no reading."""

Shown = tuple[tuple[tuple[str, str, str, int], ...], str, str]
"""Objects (colour, form, size, place), pattern and background."""


def shapes_folder() -> Path:
    """Return the folder of the model."""
    found = find_shapes()
    assert found is not None, "models/shapes has no weights"
    return found


def write_random(folder: Path, seed: int = 1) -> None:
    """Write a folder of the same models with random weights, for what depends on no training."""
    torch.manual_seed(seed)
    parts = build_parts()
    for tensor in parts["transformer"].parameters():  # what starts at zero would hide a lost tensor
        torch.nn.init.normal_(tensor, std=0.05)
    write_folder(folder, parts)


def write_float32(folder: Path, out: Path) -> Path:
    """Write the folder with its numbers in float32, in which workers then compute."""
    return write_folder_as(folder, out, torch.float32)


def draw_plain(pipe: Any, at: int = 0, *, text_tokens: int = T5_TOKENS) -> torch.Tensor:
    """Draw sentence ``at`` with diffusers' pipeline: (3, 256, 256) in [-1, 1]."""
    with torch.no_grad():
        return pipeline_sampler(pipe, steps=STEPS, guidance=GUIDANCE, text_tokens=text_tokens)([TEXTS[at]], SEED)[0]


def shown(image: torch.Tensor) -> Shown:
    """Read a picture back."""
    reading = read(image)
    things = tuple((each.colour, each.form, each.size, each.cell) for each in reading.things)
    return tuple(sorted(things)), reading.pattern, reading.background
