"""Draw the graphs of ComfyUI workflows: ``python benchmarks/workflow_pictures.py FILE.json ...``.

Writes a JPEG of the same name beside each file, which ComfyUI's template browser shows: nodes with their widgets where
ComfyUI's page has them, links in its colours by type. Needs no ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

MARGIN: Final = 40
TITLE: Final = 28
SLOT: Final = 20
FIRST_SLOT: Final = 14
"""From a node's top to the middle of its first slot."""
BACKGROUND, NODE, BAR, WIDGET, TEXT, SOFT = "#202020", "#353535", "#2c2c2c", "#222222", "#dddddd", "#999999"
COLOURS: Final = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "CONTROL_NET": "#6ee7b7", "MASK": "#81c784", "VIDEO": "#4db6ac",
}  # fmt: skip
CURVE_STEPS: Final = 40
QUALITY: Final = 88


def draw(workflow: Mapping[str, Any]) -> Image.Image:
    """Draw a workflow in the format of ComfyUI's page, a pixel for each of its units."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    left = min(node["pos"][0] for node in nodes.values()) - MARGIN
    top = min(node["pos"][1] for node in nodes.values()) - MARGIN - TITLE
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + MARGIN
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values()) + MARGIN
    picture = Image.new("RGB", (int(right - left), int(bottom - top)), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for node in nodes.values():
        _draw_node(pen, node, left, top)
    for _, source, out, target, into, kind in workflow["links"]:
        start, end = _slot(nodes[source], "outputs", out, left, top), _slot(nodes[target], "inputs", into, left, top)
        pen.line(_curve(start, end), fill=_colour(kind), width=3, joint="curve")
    for node in nodes.values():
        _draw_slots(pen, node, left, top)
    return picture


def _draw_node(pen: ImageDraw.ImageDraw, node: Mapping[str, Any], left: float, top: float) -> None:
    x, y = node["pos"][0] - left, node["pos"][1] - top
    width, height = node["size"]
    pen.rounded_rectangle((x, y - TITLE, x + width, y + height), 8, fill=NODE, outline="#111111")
    pen.rounded_rectangle((x, y - TITLE, x + width, y), 8, fill=BAR)
    pen.text((x + 12, y - TITLE / 2), node.get("title", node["type"]), fill=TEXT, font=_font(14), anchor="lm")
    slots = max(len(node["inputs"]), len(node["outputs"]))
    at = y + 4 + SLOT * slots
    for value in node.get("widgets_values", ()):
        if at + SLOT > y + height:
            break
        pen.rounded_rectangle((x + 12, at, x + width - 12, at + SLOT - 3), 6, fill=WIDGET)
        pen.text((x + 22, at + (SLOT - 3) / 2), _cut(str(value), width - 44), fill=SOFT, font=_font(12), anchor="lm")
        at += SLOT


def _draw_slots(pen: ImageDraw.ImageDraw, node: Mapping[str, Any], left: float, top: float) -> None:
    for side, anchor, shift in (("inputs", "lm", 10), ("outputs", "rm", -10)):
        for number, slot in enumerate(node[side]):
            x, y = _slot(node, side, number, left, top)
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=_colour(slot["type"]))
            pen.text((x + shift, y), slot["name"], fill=TEXT, font=_font(12), anchor=anchor)


def _slot(node: Mapping[str, Any], side: str, number: int, left: float, top: float) -> tuple[float, float]:
    x = node["pos"][0] - left + (0 if side == "inputs" else node["size"][0])
    return x, node["pos"][1] - top + FIRST_SLOT + SLOT * number


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Return points of a cubic curve that leaves and arrives horizontally."""
    reach = max(40.0, abs(end[0] - start[0]) / 2)
    corners = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    found = []
    for step in range(CURVE_STEPS + 1):
        t = step / CURVE_STEPS
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x, y = (sum(w * corner[axis] for w, corner in zip(weights, corners, strict=True)) for axis in (0, 1))
        found.append((x, y))
    return found


def _colour(kind: str) -> str:
    """Return ComfyUI's colour of a type, or one that its name always gives."""
    return COLOURS.get(kind) or f"hsl({zlib.crc32(kind.encode()) % 360}, 50%, 65%)"


def _cut(text: str, width: float) -> str:
    text = " ".join(text.split())
    font = _font(12)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workflows", type=Path, nargs="+", help="JSON files of ComfyUI's page")
    for path in parser.parse_args().workflows:
        draw(json.loads(path.read_text())).save(path.with_suffix(".jpg"), quality=QUALITY)


if __name__ == "__main__":
    main()
