"""Where ComfyUI's methods put the tokens of reference latents, for the models that its class ``Flux`` runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

METHODS: Final = ("offset", "index", "uxo")
"""Those that are positions alone; ``index_timestep_zero`` also modulates references as at timestep 0."""


def reference_places(
    method: str, image: tuple[int, int], references: Iterable[tuple[int, int]], step: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the first coordinate of each reference, and how far it is moved down and across, in latents.

    ``offset`` puts them side by side on the plane 1, along the shorter side of what is there; ``index`` each on a plane
    of its own, ``step`` apart; ``uxo`` behind the image, on its plane. Sizes are (height, width).
    """
    down = across = 0
    for number, (height, width) in enumerate(references, 1):
        if method == "index":
            yield step * number, 0, 0
        elif method == "uxo":
            yield 0, image[0] + down, image[1] + across
            down, across = down + height, across + width
        else:
            top, left = (0, across) if height + down > width + across else (down, 0)
            yield 1, top, left
            down, across = max(down, height + top), max(across, width + left)
