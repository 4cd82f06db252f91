"""What a picture of ``shapes`` may show, and which combinations of form and colour training never sees.

Lengths are in sides of the picture: (0, 0) is the upper left corner, (1, 1) the lower right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Final

FORMS: Final = ("circle", "square", "triangle", "star", "ring", "crescent", "heart", "arrow")
COLOURS: Final = {
    "red": (0.86, 0.12, 0.12),
    "orange": (1.0, 0.52, 0.04),
    "yellow": (0.98, 0.84, 0.06),
    "green": (0.1, 0.6, 0.25),
    "cyan": (0.05, 0.72, 0.78),
    "blue": (0.1, 0.28, 0.86),
    "purple": (0.55, 0.15, 0.7),
    "black": (0.08, 0.08, 0.08),
}
"""Of objects, by name: red, green and blue from 0 to 1."""
BACKGROUNDS: Final = {
    "white": (1.0, 1.0, 1.0),
    "grey": (0.76, 0.76, 0.78),
    "light blue": (0.7, 0.84, 1.0),
    "light green": (0.74, 0.93, 0.74),
    "cream": (1.0, 0.9, 0.68),
    "pink": (1.0, 0.78, 0.85),
}
PATTERNS: Final = ("plain", "striped", "graded")
"""Striped and graded backgrounds go between their colour and white, so they are never white themselves."""
SIZES: Final = {"small": (0.08, 0.095), "large": (0.14, 0.17)}
"""Radii."""
MIDDLE_RADIUS: Final = 0.117
"""Between small and large."""
CELLS: Final = 9
"""Places: thirds of the picture, row by row."""
MAX_OBJECTS: Final = 3
_BORDER: Final = 0.03
_JITTER: Final = 0.04
_GAP: Final = 0.03
_COLOUR_NAMES: Final = tuple(COLOURS)


@dataclass(frozen=True)
class Thing:
    """An object: ``x`` and ``y`` of its middle, its radius ``r``, and the names of its properties."""

    form: str
    colour: str
    size: str
    cell: int
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. No two things have the same form and colour, and none overlap."""

    things: tuple[Thing, ...]
    pattern: str
    background: str


def is_held_out(form: str, colour: str) -> bool:
    """Tell whether training never sees this form in this colour: one colour of six of the eight forms."""
    return (3 * FORMS.index(form) + 5 * _COLOUR_NAMES.index(colour)) % 11 == 4


PAIRS: Final = tuple((form, colour) for form in FORMS for colour in COLOURS if not is_held_out(form, colour))
HELD_OUT: Final = tuple((form, colour) for form in FORMS for colour in COLOURS if is_held_out(form, colour))


def sample_scene(rng: Random, cells: tuple[int, ...], *, held_out: bool = False) -> Scene:
    """Draw a scene with one thing in each of ``cells``; with ``held_out``, one of them is a combination held out."""
    pairs = rng.sample(PAIRS, len(cells))
    if held_out:
        pairs[rng.randrange(len(pairs))] = rng.choice(HELD_OUT)
    pattern = rng.choices(PATTERNS, (0.5, 0.25, 0.25))[0]
    background = rng.choice([name for name in BACKGROUNDS if pattern == "plain" or name != "white"])
    for attempt in range(100):
        sizes = [rng.choice(tuple(SIZES)) if attempt < 20 else "small" for _ in cells]
        things = tuple(_placed(rng, *pair, size, cell) for pair, size, cell in zip(pairs, sizes, cells, strict=True))
        if all(_apart(one, other) for one, other in combinations(things, 2)):
            return Scene(things, pattern, background)
    raise AssertionError(f"cells {cells}: no places without overlap")


def _placed(rng: Random, form: str, colour: str, size: str, cell: int) -> Thing:
    r = rng.uniform(*SIZES[size])
    return Thing(form, colour, size, cell, _along(rng, cell % 3, r), _along(rng, cell // 3, r), r)


def _along(rng: Random, third: int, r: float) -> float:
    if third == 1:
        return 0.5 + rng.uniform(-_JITTER / 2, _JITTER / 2)
    near = _BORDER + r + rng.uniform(0, _JITTER)
    return near if third == 0 else 1 - near


def _apart(one: Thing, other: Thing) -> bool:
    return (one.x - other.x) ** 2 + (one.y - other.y) ** 2 > (one.r + other.r + _GAP) ** 2
