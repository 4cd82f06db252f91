"""Degrees of a parallel layout (ulysses, ring, cfg), and the text form of the ``layout`` setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

AUTO: Final = "auto"
MAX_DEGREE: Final = 1024


@dataclass(frozen=True, slots=True)
class Degrees:
    """Parallel degrees; their product is the number of workers.

    Ranks are numbered with ``ulysses`` fastest, then ``ring``, then ``cfg``, as in xfuser: neighbouring ranks share the
    tokens of one image.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    @property
    def sequence(self) -> int:
        """The number of workers that share the tokens of one image."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        return self.ulysses * self.ring * self.cfg

    def named(self) -> dict[str, int]:
        """Return every degree by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        """As in the setting, without degrees of 1; ``ulysses=1`` if all are 1."""
        return ",".join(f"{name}={degree}" for name, degree in self.named().items() if degree > 1) or "ulysses=1"


NAMES: Final = tuple(field.name for field in fields(Degrees))


def parse_layout(text: str) -> Mapping[str, int]:
    """Return the degrees that ``text`` names, none for ``auto``; ``choose_layout`` chooses the others.

    Raises:
        ValueError: a name is unknown or repeated, or a degree is not a number from 1 to 1024.
    """
    if text == AUTO:
        return {}
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, degree = (word.strip() for word in part.partition("="))
        if name == "pipefusion":
            raise ValueError(f"layout {text!r}: PipeFusion was removed, since its results were not exact; use auto")
        if name not in NAMES or name in found:
            raise ValueError(f"layout {text!r}: use auto, or each of {', '.join(NAMES)} at most once")
        if not degree.isdecimal() or not 1 <= int(degree) <= MAX_DEGREE:
            raise ValueError(f"layout {text!r}: {name} takes a whole number from 1 to {MAX_DEGREE}, as in {name}=2")
        found[name] = int(degree)
    return found


def spell(asked: Mapping[str, int]) -> str:
    """Format requested degrees as :func:`parse_layout` reads them."""
    return ",".join(f"{name}={degree}" for name, degree in asked.items()) or AUTO
