"""Draw scenes with antialiased edges, thousands of pictures a second on a GPU.

    PYTHONPATH=tools:.pkg python -m shapes.draw out/drawn.png     # 32 scenes, each with its sentence on standard output

Every form is a signed distance in units of its radius: negative inside, x to the right, y downwards.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

import torch

from shapes.scenes import BACKGROUNDS, COLOURS, FORMS, MAX_OBJECTS, PATTERNS, Scene
from shapes.words import sample_request

PIXELS: Final = 256
STRIPES: Final = 8
OUTLINE: Final = 0.2
"""The width of lines in radii, where outlines are drawn in place of forms. Both lines of a ring fill it."""
_NAMES: Final = tuple(COLOURS)
_BACKGROUND_NAMES: Final = tuple(BACKGROUNDS)
FIELDS: Final = 5
"""Numbers that :func:`encode` writes of a thing."""
_NOTHING: Final = (-1.0,) * FIELDS


def outlined(far: torch.Tensor, width: float) -> torch.Tensor:
    """Turn distances to forms into distances to lines of this width inside their edges; 0 leaves them."""
    return (far + width / 2).abs() - width / 2 if width else far


def distance(form: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the signed distances of points to a form of radius 1, nearly exact near its edge."""
    from_middle = torch.hypot(x, y)
    if form == "circle":
        return from_middle - 0.92
    if form == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.82
    if form == "triangle":
        return torch.maximum(y - 0.72, 0.866 * x.abs() - 0.5 * (y - 0.2) - 0.52)
    if form == "star":
        sector = math.pi / 5
        angle = torch.atan2(x, -y).remainder(2 * sector)
        angle = torch.minimum(angle, 2 * sector - angle)
        inner = 0.45
        across, along = inner * math.sin(sector), 1 - inner * math.cos(sector)
        length = math.hypot(across, along)
        u, v = from_middle * angle.sin(), from_middle * angle.cos()
        return (u * along + (v - 1) * across) / length
    if form == "ring":
        return (from_middle - 0.72).abs() - 0.2
    if form == "crescent":
        return torch.maximum(torch.hypot(x - 0.1, y) - 0.92, 0.76 - torch.hypot(x - 0.48, y))
    if form == "heart":
        side = 0.56
        u, v = (x + y - 0.02) * math.sqrt(0.5), (y - 0.02 - x) * math.sqrt(0.5)
        diamond = torch.maximum(u.abs(), v.abs()) - side
        lobes = torch.minimum(torch.hypot(u + side, v), torch.hypot(u, v + side)) - side
        return torch.minimum(diamond, lobes)
    if form == "arrow":
        shaft = torch.maximum((x + 0.42).abs() - 0.54, y.abs() - 0.22)
        slope = math.hypot(0.7, 0.9)
        head = torch.maximum(0.06 - x, (0.9 * y.abs() - 0.7 * (0.96 - x)) / slope)
        return torch.minimum(shaft, head)
    raise AssertionError(form)


def encode(scenes: Sequence[Scene]) -> torch.Tensor:
    """Write scenes as numbers for :func:`draw`: (scenes, 4, 5) float32, three things and the background."""
    rows = []
    for scene in scenes:
        row: list[tuple[float, ...]] = [
            (FORMS.index(each.form), _NAMES.index(each.colour), each.x, each.y, each.r) for each in scene.things
        ]
        row += [_NOTHING] * (MAX_OBJECTS - len(row))
        row.append((PATTERNS.index(scene.pattern), _BACKGROUND_NAMES.index(scene.background), *_NOTHING[2:]))
        rows.append(row)
    return torch.tensor(rows).view(len(scenes), MAX_OBJECTS + 1, FIELDS)


def draw(
    rows: torch.Tensor, device: torch.device | str = "cpu", *, pixels: int = PIXELS, outline: float = 0.0
) -> torch.Tensor:
    """Draw what :func:`encode` wrote: (scenes, 3, pixels, pixels), float32 in [-1, 1], on ``device``.

    ``rows`` are on the CPU, so that the GPU need not be waited for. With ``outline``, forms are drawn as lines of
    this width, in radii, along their edges.
    """
    axis = (torch.arange(pixels, device=device) + 0.5) / pixels
    image = _backgrounds(rows[:, MAX_OBJECTS], axis)
    things = rows[:, :MAX_OBJECTS].flatten(0, 1)
    of_scene = torch.arange(len(rows)).repeat_interleave(MAX_OBJECTS)
    tones = torch.tensor(list(COLOURS.values()))
    for number, form in enumerate(FORMS):
        chosen = (things[:, 0] == number).nonzero()[:, 0]
        if not len(chosen):
            continue
        found = things[chosen].to(device, non_blocking=True)
        x, y, r = (found[:, field, None, None] for field in (2, 3, 4))
        far = outlined(distance(form, (axis - x) / r, (axis[:, None] - y) / r), outline)
        cover = (0.5 - far * r * pixels).clamp(0, 1)[:, None]
        tone = tones[things[chosen, 1].long()].to(device, non_blocking=True)[:, :, None, None]
        at = of_scene[chosen].to(device, non_blocking=True)
        # Things do not overlap, so each adds its difference from the background below it.
        image.index_add_(0, at, cover * (tone - _backgrounds(rows[of_scene[chosen], MAX_OBJECTS], axis)))
    return image * 2 - 1


def _backgrounds(rows: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    tones = torch.tensor(list(BACKGROUNDS.values()))[rows[:, 1].long()].to(axis.device)[:, :, None, None]
    pattern = rows[:, 0].to(axis.device)[:, None, None, None]
    stripes = (torch.sin(axis * (2 * math.pi * STRIPES)) * 4).clamp(-0.5, 0.5) + 0.5
    whiteness = torch.where(pattern == 1, stripes[None, None, None, :], axis[None, None, :, None] * (pattern == 2))
    return (tones + (1 - tones) * whiteness).expand(-1, 3, len(axis), len(axis)).clone()


def sheet(images: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Lay pictures out in rows: (3, height, width), uint8 on the CPU. ``images`` are as :func:`draw` gives them."""
    rows = [torch.cat(list(part), 2) for part in images.split(columns) if len(part) == columns or len(images) < columns]
    return ((torch.cat(rows, 1).float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()


def save_sheet(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    from PIL import Image

    Image.fromarray(sheet(images, columns).permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scenes of shapes, and print the sentence of each.")
    parser.add_argument("out", type=Path, help="a .png file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outline", type=float, default=0.0, help="draw lines of this width instead, in radii")
    given = parser.parse_args()
    rng = Random(given.seed)
    requests = [sample_request(rng) for _ in range(32)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(draw(encode([each.scene for each in requests]), outline=given.outline), given.out)
    print("\n".join(each.text for each in requests))


if __name__ == "__main__":
    main()
