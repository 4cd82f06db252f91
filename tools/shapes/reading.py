"""Read a picture of ``shapes`` back: its objects with form, colour, size and place, and its background.

    PYTHONPATH=tools:.pkg python -m shapes.reading out/demo.png        # as JSON on standard output

No model is involved. Each pixel belongs to the object colour or the background tone that it is nearest to; connected
pixels of objects are one object; its form is the one whose outline, laid over it, overlaps best.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from shapes.draw import distance, outlined
from shapes.scenes import BACKGROUNDS, COLOURS, FORMS, MIDDLE_RADIUS

SMALLEST_AREA: Final = 0.0008
"""Of an object, in areas of the picture: half of that of a small crescent. What is smaller is a speck."""
SPECK_AREA: Final = 0.0001
"""Smaller specks are ignored; larger ones count as objects without a form."""
MOST_OBJECTS: Final = 8
"""Of the largest objects that are read: a picture with so many is wrong in any case."""
LEAST_OVERLAP: Final = 0.72
"""Intersection over union of an object and the form that it is taken for."""
MOST_COLOUR_ERROR: Final = 0.3
_WHITENESS: Final = torch.linspace(0, 1, 9)


@dataclass(frozen=True)
class Found:
    """An object in a picture; lengths as in :class:`~shapes.scenes.Thing`. ``form`` and ``colour`` may be ""."""

    form: str
    colour: str
    x: float
    y: float
    r: float
    overlap: float

    @property
    def size(self) -> str:
        return "small" if self.r < MIDDLE_RADIUS else "large"

    @property
    def cell(self) -> int:
        return _third(self.y) * 3 + _third(self.x)


@dataclass(frozen=True)
class Reading:
    """What a picture shows, objects from left to right; ``pattern`` and ``background`` as in a scene."""

    things: tuple[Found, ...]
    pattern: str
    background: str


def read(image: torch.Tensor, *, outline: float = 0.0) -> Reading:
    """Read a picture, (3, side, side), floating-point in [-1, 1], on the CPU.

    With ``outline``, forms are looked for as lines of this width in radii, and filled ones have no form.
    """
    pixels = ((image.float().clamp(-1, 1) + 1) / 2).permute(1, 2, 0)
    objects = torch.tensor(list(COLOURS.values()))
    to_objects = torch.cdist(pixels.flatten(0, 1), objects)
    to_backgrounds = torch.cdist(pixels.flatten(0, 1), _background_tones())
    nearest = to_objects.min(1)
    is_object = (nearest.values < to_backgrounds.min(1).values).view(image.shape[1:])
    labels = nearest.indices.view(image.shape[1:])
    errors = nearest.values.view(image.shape[1:])
    components = [each for each in _components(is_object) if each.sum() > SPECK_AREA * is_object.numel()]
    components = sorted(components, key=lambda each: -int(each.sum()))[:MOST_OBJECTS]
    things = [_described(component, labels, errors, outline) for component in components]
    pattern, background = _background(pixels, ~_widened(is_object, 2))
    return Reading(tuple(sorted(things, key=lambda each: each.x)), pattern, background)


def read_file(path: Path, *, outline: float = 0.0) -> dict[str, Any]:
    """Read a square picture's file; return ``things``, each with its size and cell, ``pattern`` and ``background``.

    ``outline`` is as for :func:`read`.

    Raises:
        OSError: it cannot be opened, or is no picture.
    """
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        reading = read(pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1, outline=outline)
    things = [{**asdict(each), "size": each.size, "cell": each.cell} for each in reading.things]
    return {"things": things, "pattern": reading.pattern, "background": reading.background}


def main() -> None:
    parser = argparse.ArgumentParser(description="Read pictures of shapes, and write what they show as JSON.")
    parser.add_argument("images", nargs="+", type=Path, help="square image files")
    print(json.dumps([read_file(path) for path in parser.parse_args().images]))


@cache
def _background_tones() -> torch.Tensor:
    tones = torch.tensor(list(BACKGROUNDS.values()))
    return (tones[:, None] + (1 - tones[:, None]) * _WHITENESS[None, :, None]).flatten(0, 1)


def _third(along: float) -> int:
    return 0 if along < 0.37 else 1 if along < 0.63 else 2


def _components(mask: torch.Tensor) -> list[torch.Tensor]:
    """Split a mask into its connected parts, by runs of rows that touch (diagonally, too)."""
    parents: list[int] = []

    def root(at: int) -> int:
        while parents[at] != at:
            parents[at] = parents[parents[at]]
            at = parents[at]
        return at

    edges = torch.diff(torch.nn.functional.pad(mask.to(torch.int8), (1, 1)), dim=1)
    runs: list[tuple[int, int, int]] = []
    before: list[int] = []
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    row_before = -2
    here: list[int] = []
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        if row != row_before:
            before, here = (here if row == row_before + 1 else []), []
            row_before = row
        parents.append(len(runs))
        for other in before:
            if runs[other][1] <= end and start <= runs[other][2]:
                parents[root(other)] = root(len(runs))
        here.append(len(runs))
        runs.append((row, start, end))
    parts: dict[int, torch.Tensor] = {}
    for number, (row, start, end) in enumerate(runs):
        part = parts.setdefault(root(number), torch.zeros_like(mask))
        part[row, start:end] = True
    return list(parts.values())


def _described(component: torch.Tensor, labels: torch.Tensor, errors: torch.Tensor, outline: float) -> Found:
    side = component.shape[0]
    rows, columns = component.any(1).nonzero()[:, 0], component.any(0).nonzero()[:, 0]
    top, bottom, left, right = (int(each) for each in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    box = component[top:bottom, left:right]
    interior = ~_widened(torch.nn.functional.pad(~box, (1, 1, 1, 1), value=True), 1)[1:-1, 1:-1]
    inner = interior if interior.any() else box
    labels, errors = labels[top:bottom, left:right], errors[top:bottom, left:right]
    colour = int(labels[inner].bincount().argmax())
    is_sure = float(errors[inner & (labels == colour)].mean()) < MOST_COLOUR_ERROR
    best = max((_fitted(box, form, left, top, outline) for form in FORMS), key=lambda found: found[1])
    form, overlap, x, y, r = best
    is_known = overlap >= LEAST_OVERLAP and int(component.sum()) >= SMALLEST_AREA * component.numel()
    return Found(
        form=form if is_known else "",
        colour=tuple(COLOURS)[colour] if is_sure else "",
        x=x / side,
        y=y / side,
        r=r / side,
        overlap=round(overlap, 3),
    )


def _fitted(
    box: torch.Tensor, form: str, left: int, top: int, outline: float
) -> tuple[str, float, float, float, float]:
    """Lay a form over a box with an object; return (form, overlap, x, y, r), lengths in pixels."""
    x0, x1, y0, y1 = _extent(form)
    height, width = box.shape
    r = (width / (x1 - x0) + height / (y1 - y0)) / 2
    x, y = width / 2 - r * (x0 + x1) / 2, height / 2 - r * (y0 + y1) / 2
    columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    laid = outlined(distance(form, (columns[None] - x) / r, (rows[:, None] - y) / r), outline) < 0
    overlap = float((laid & box).sum() / (laid | box).sum())
    return form, overlap, left + x, top + y, r


@cache
def _extent(form: str) -> tuple[float, float, float, float]:
    """Return the box around a form of radius 1: left, right, top, bottom."""
    axis = torch.linspace(-1.3, 1.3, 1041)
    inside = distance(form, axis[None], axis[:, None]) < 0
    columns, rows = axis[inside.any(0)], axis[inside.any(1)]
    return float(columns[0]), float(columns[-1]), float(rows[0]), float(rows[-1])


def _widened(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0


def _background(pixels: torch.Tensor, mask: torch.Tensor) -> tuple[str, str]:
    """Name pattern and colour of the pixels under ``mask``: how far each is on the way from a colour to white."""
    seen = pixels[mask]
    if not len(seen):
        return "", ""
    # The colour in whose direction from white all pixels lie; white is the one that none leave.
    away = 1 - seen.mean(0)
    if float(away.norm()) < 0.06:
        return "plain", "white"
    names = [name for name in BACKGROUNDS if name != "white"]
    full = 1 - torch.tensor([BACKGROUNDS[name] for name in names])
    at = int(torch.nn.functional.cosine_similarity(away[None], full).argmax())
    amount = ((1 - pixels) @ full[at] / full[at].dot(full[at])).masked_fill(~mask, float("nan"))
    columns, rows = amount.nanmean(0), amount.nanmean(1)
    across, down = (line[~line.isnan()] for line in (columns, rows))
    if len(down) > 8 and float(down[: len(down) // 8].mean() - down[-(len(down) // 8) :].mean()) > 0.5:
        return "graded", names[at]
    # Of stripes, half of the columns are white; their mean is half a colour.
    if float(across.std()) > 0.25:
        return "striped", names[at]
    return "plain", names[at]


if __name__ == "__main__":
    main()
