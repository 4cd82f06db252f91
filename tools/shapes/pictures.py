"""Draw the pictures of ``shapes`` that README and the model card show, and put them there.

    PYTHONPATH=tools:.pkg python -m shapes.pictures models/shapes           # float32, CPU, 20 steps
    PYTHONPATH=tools:.pkg python -m shapes.pictures models/shapes --seed 3  # with other noise

Four sentences, three in English and one in Chinese, become ``docs/shapes/*.png``, and a table of them is written
between the marks in ``README.md`` and ``models/shapes/README.md``. A picture that does not show what its sentence says
is no example: then nothing is written, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

import torch

from shapes.arguments import pipeline_folder, whole
from shapes.draw import save_sheet
from shapes.judge import judge
from shapes.pages import replaced
from shapes.samplers import GUIDANCE, STEPS, Sampler, open_pipeline, pipeline_sampler
from shapes.scenes import Scene, Thing
from shapes.words import Request

BEGIN: Final = "<!-- pictures of shapes: written by tools/shapes/pictures.py -->"
END: Final = "<!-- end of pictures -->"
PAGES: Final = (Path("README.md"), Path("models/shapes/README.md"))
FOLDER: Final = Path("docs/shapes")


def _thing(form: str, colour: str, size: str, cell: int) -> Thing:
    radius = 0.15 if size == "large" else 0.09
    x, y = ((0.05 + radius, 0.5, 0.95 - radius)[third] for third in (cell % 3, cell // 3))
    return Thing(form, colour, size, cell, x, y, radius)


EXAMPLES: Final = {
    "heart_and_star": Request(
        "A large purple heart to the left of a small blue star, on a light green background.",
        "en",
        Scene((_thing("heart", "purple", "large", 3), _thing("star", "blue", "small", 5)), "plain", "light green"),
        sizes=frozenset({0, 1}),
        relations=((0, "left", 1),),
        has_background=True,
    ),
    "crescent": Request(
        "A red crescent in the upper left corner, on a background graded from light blue to white.",
        "en",
        Scene((_thing("crescent", "red", "large", 0),), "graded", "light blue"),
        places=frozenset({0}),
        has_background=True,
    ),
    "arrow_and_square": Request(
        "An orange arrow above a black square, on pink stripes.",
        "en",
        Scene((_thing("arrow", "orange", "large", 1), _thing("square", "black", "large", 7)), "striped", "pink"),
        relations=((0, "above", 1),),
        has_background=True,
    ),
    "circle": Request(
        "一个大的绿色圆形，米色条纹背景。",
        "zh",
        Scene((_thing("circle", "green", "large", 4),), "striped", "cream"),
        sizes=frozenset({0}),
        has_background=True,
    ),
}
"""Sentences with what they state, by the names of their files."""


def draw_examples(sampler: Sampler, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Draw each sentence, and read it back; return the pictures, and the faults of those that have some."""
    drawn, found = judge(sampler, list(EXAMPLES.values()), batch=1, seed=seed)
    images, wrong = dict(zip(EXAMPLES, drawn, strict=True)), dict(zip(EXAMPLES, found, strict=True))
    return images, {name: faults for name, faults in wrong.items() if faults}


def write_pictures(root: Path, images: dict[str, torch.Tensor]) -> list[Path]:
    """Write the files, and the table into each page; return the paths.

    Raises:
        ValueError: a page has no marks, or not in their order.
    """
    pages = {page: _with_table((root / page).read_text(encoding="utf-8"), page) for page in PAGES}
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    written = []
    for name, image in images.items():
        written.append(root / FOLDER / f"{name}.png")
        save_sheet(image[None], written[-1])
    for page, text in pages.items():
        written.append(root / page)
        (root / page).write_text(text, encoding="utf-8")
    return written


def _with_table(text: str, page: Path) -> str:
    to = os.path.relpath(FOLDER, page.parent)
    rows = [
        " | ".join(f"![{request.text}]({to}/{name}.png)" for name, request in EXAMPLES.items()),
        "|".join("---" for _ in EXAMPLES),
        " | ".join(request.text for request in EXAMPLES.values()),
    ]
    table = "\n".join(f"| {row} |" if " | " in row else f"|{row}|" for row in rows)
    return replaced(text, page, BEGIN, END, table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of README and the model card.")
    parser.add_argument("folder", type=pipeline_folder, help="the pipeline's folder")
    parser.add_argument("--root", type=Path, default=Path(), help="of the checkout, unless it is the current folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=whole(1), default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    given = parser.parse_args(arguments)
    sampler = pipeline_sampler(open_pipeline(given.folder), steps=given.steps, guidance=given.guidance)
    with torch.no_grad():
        images, wrong = draw_examples(sampler, given.seed)
    if wrong:
        for name, found in wrong.items():
            print(f"{EXAMPLES[name].text} {'; '.join(found)}", file=sys.stderr)
        sys.exit("nothing is written: pictures differ from their sentences; try another --seed")
    for path in write_pictures(given.root, images):
        print(path)


if __name__ == "__main__":
    main()
