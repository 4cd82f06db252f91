"""Judge a LoRA of ``shapes`` that draws outlines, at several strengths: which objects are filled, which are outlines.

L=models/shapes/loras/outlines.safetensors
PYTHONPATH=tools:.pkg python -m shapes.judged_lora models/shapes $L            # diffusers, CPU
PYTHONPATH=tools:.pkg python -m shapes.judged_lora models/shapes $L --daemon   # a running daemon
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from shapes.arguments import output_file, pipeline_folder, safetensors_file, whole
from shapes.draw import OUTLINE, save_sheet
from shapes.judge import draw_requests, held_out_requests
from shapes.reading import read
from shapes.samplers import GUIDANCE, STEPS, Sampler, daemon_sampler, open_pipeline, pipeline_sampler
from shapes.words import Request

STRENGTHS: Final = (0.0, 0.5, 1.0)
SENTENCES: Final = 40
_SHOWN: Final = 8
_ADAPTER: Final = "outlines"


def count_forms(requests: Sequence[Request], images: torch.Tensor) -> dict[str, int]:
    """Count the objects that pictures show as their sentences ask, as filled forms or as outlines, as they fit better.

    Rings are left out: outlines fill them.
    """
    counts = {"objects": 0, "filled": 0, "outlines": 0}
    for request, image in zip(requests, images, strict=True):
        fits = [_fits(image, outline) for outline in (0.0, OUTLINE)]
        for thing in request.scene.things:
            if thing.form != "ring":
                counts["objects"] += 1
                filled, outlines = (each.get((thing.form, thing.colour), 0.0) for each in fits)
                counts["filled"] += filled >= outlines and filled > 0
                counts["outlines"] += outlines > filled
    return counts


def _fits(image: torch.Tensor, outline: float) -> dict[tuple[str, str], float]:
    """Return how well objects fit the forms that they are taken for, by form and colour."""
    return {(each.form, each.colour): each.overlap for each in read(image, outline=outline).things}


def judge_strengths(
    sampler_at: Callable[[float], Sampler], requests: Sequence[Request], *, batch: int
) -> tuple[dict[str, dict[str, int]], torch.Tensor]:
    """Draw every request at each of :data:`STRENGTHS`, on the same noise; print a line for each.

    Returns the counts by strength, and a row of pictures for each.
    """
    found, shown = {}, []
    print("strength  objects  filled  outlines", flush=True)
    for strength in STRENGTHS:
        with torch.no_grad():
            images = draw_requests(sampler_at(strength), requests, batch=batch)
        counts = found[str(strength)] = count_forms(requests, images)
        print(f"{strength:8} {counts['objects']:8} {counts['filled']:7} {counts['outlines']:9}", flush=True)
        shown.append(images[:: max(1, len(images) // _SHOWN)][:_SHOWN])
    return found, torch.cat(shown)


def write_report(
    found: Mapping[str, Mapping[str, int]], shown: torch.Tensor, *, json_file: Path | None, sheet: Path | None
) -> None:
    """Write the counts, and the pictures, a row for each strength; a file without a path is left out."""
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if sheet:
        save_sheet(shown, sheet, columns=len(shown) // len(STRENGTHS))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Judge a LoRA of shapes that draws outlines, at several strengths.")
    parser.add_argument("folder", type=pipeline_folder, help="the pipeline's folder")
    parser.add_argument("lora", type=safetensors_file, help="what shapes.lora wrote")
    parser.add_argument("--daemon", action="store_true", help="draw with the workers of the running daemon of xditd")
    parser.add_argument("--device", default="cpu", help="of diffusers; a daemon has its own")
    parser.add_argument("--sentences", type=whole(1), default=SENTENCES)
    parser.add_argument("--steps", type=whole(1), default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch", type=whole(1), default=8)
    parser.add_argument("--json", type=output_file(".json"), help="write the counts here")
    parser.add_argument("--sheet", type=output_file(".png"), help="write pictures here, a row for each strength")
    given = parser.parse_args(arguments)
    options = {"steps": given.steps, "guidance": given.guidance}
    with ExitStack() as stack:
        if given.daemon:
            from xditd.client import Pipeline

            pipe = stack.enter_context(Pipeline.open(given.folder, wait_s=60.0))

            def at(strength: float) -> Sampler:
                return daemon_sampler(pipe, loras=[(given.lora, strength)], **options)
        else:
            pipeline = _diffusers(given)

            def at(strength: float) -> Sampler:
                pipeline.set_adapters(_ADAPTER, strength)
                return pipeline_sampler(pipeline, **options)

        found, shown = judge_strengths(at, held_out_requests(given.sentences), batch=given.batch)
    write_report(found, shown, json_file=given.json, sheet=given.sheet)


def _diffusers(given: argparse.Namespace) -> Any:
    pipeline = open_pipeline(given.folder, device=given.device)
    pipeline.load_lora_weights(given.lora.parent, weight_name=given.lora.name, adapter_name=_ADAPTER)
    return pipeline


if __name__ == "__main__":
    main()
