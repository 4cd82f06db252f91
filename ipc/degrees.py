"""The degrees of a parallel layout, and how settings name them: ``auto``, or ``ulysses=2,ring=2``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

AUTO: Final = "auto"
MAX_DEGREE: Final = 1024


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ways each thing is split; their product is the number of workers.

    Ranks count in this order, ``ulysses`` fastest: neighbours share the tokens of one image, ring by ring, then come
    the halves of a batch. It is xfuser's order, too.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    @property
    def sequence(self) -> int:
        """Over how many workers the tokens of one image are split."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        return self.ulysses * self.ring * self.cfg

    def named(self) -> dict[str, int]:
        """Every degree by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        """As the setting spells it; degrees of 1 are left out, except where all are."""
        return ",".join(f"{name}={degree}" for name, degree in self.named().items() if degree > 1) or "ulysses=1"


NAMES: Final = tuple(field.name for field in fields(Degrees))


def parse_layout(text: str) -> Mapping[str, int]:
    """Return the degrees that ``text`` names; none for ``auto``. ``choose_layout`` chooses what is not named.

    Raises:
        ValueError: a name that is unknown or comes twice, or a degree that is no number from 1 to 1024.
    """
    if text == AUTO:
        return {}
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, degree = (word.strip() for word in part.partition("="))
        if name == "pipefusion":
            raise ValueError(f"layout {text!r}: PipeFusion is gone, since its results were not exact; use auto")
        if name not in NAMES or name in found:
            raise ValueError(f"layout {text!r}: use auto, or each of {', '.join(NAMES)} at most once")
        if not degree.isdecimal() or not 1 <= int(degree) <= MAX_DEGREE:
            raise ValueError(f"layout {text!r}: {name} takes a whole number from 1 to {MAX_DEGREE}, as in {name}=2")
        found[name] = int(degree)
    return found


def spell(asked: Mapping[str, int]) -> str:
    """Spell what was asked for, as :func:`parse_layout` reads it."""
    return ",".join(f"{name}={degree}" for name, degree in asked.items()) or AUTO
