"""Judge a model of ``shapes``: draw sentences that training never saw, read the pictures back, and compare.

    PYTHONPATH=tools:.pkg python -m shapes.judge models/shapes              # 200 sentences with diffusers, float32, CPU
    PYTHONPATH=tools:.pkg python -m shapes.judge models/shapes --processes 2    # the same, faster: one thread in each
    PYTHONPATH=tools:.pkg python -m shapes.judge models/shapes --device cuda --dtype bfloat16
    PYTHONPATH=tools:.pkg python -m shapes.judge models/shapes --daemon     # with the workers of a running daemon
    PYTHONPATH=tools:.pkg python -m shapes.judge models/shapes --formats    # diffusers, then the daemon in every format

A picture is right if it shows all objects that the sentence names and no others, each in its form and colour, and all
that the sentence states of sizes, places, relations and the background.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from shapes.arguments import output_file, pipeline_folder, whole
from shapes.draw import draw, encode, save_sheet
from shapes.reading import Found, Reading, read
from shapes.samplers import GUIDANCE, STEPS, Sampler, daemon_sampler, open_pipeline, pipeline_sampler
from shapes.scenes import MAX_OBJECTS
from shapes.text_tokens import T5_TOKENS
from shapes.words import LANGUAGES, Request, sample_request

SENTENCES: Final = 200
SEED: Final = 7_000_000
"""Of the sentences of the judge; training's seeds are small."""
SHARES: Final = (0.4, 0.4, 0.2)
"""Of sentences with one, two and three objects."""


def held_out_requests(count: int = SENTENCES) -> list[Request]:
    """List sentences, each with a combination of form and colour that training never sees, in both languages."""
    rng = Random(SEED)
    ends = [round(share * count) for share in accumulate(SHARES)]
    return [
        sample_request(rng, objects=bisect_right(ends, at) + 1, language=LANGUAGES[at % 2], held_out=True)
        for at in range(count)
    ]


def faults(request: Request, reading: Reading) -> list[str]:
    """Say in what a picture differs from its sentence; an empty list is a right picture."""
    left = list(reading.things)
    found: list[Found | None] = []
    for thing in request.scene.things:
        match = next((each for each in left if (each.form, each.colour) == (thing.form, thing.colour)), None)
        if match:
            left.remove(match)
        found.append(match)
    return list(_faults(request, reading, found, left))


def _faults(request: Request, reading: Reading, found: list[Found | None], left: list[Found]) -> Iterator[str]:
    scene = request.scene
    for thing, match in zip(scene.things, found, strict=True):
        if match is None:
            yield f"no {thing.colour} {thing.form}"
    for other in left:
        yield f"also {other.colour or 'unclear'} {other.form or 'something'}"
    for at in request.sizes:
        sized = found[at]
        if sized and sized.size != scene.things[at].size:
            yield f"{scene.things[at].form}: {sized.size}"
    for at in request.places:
        placed = found[at]
        if placed and placed.cell != scene.things[at].cell:
            yield f"{scene.things[at].form}: at {placed.x:.2f}, {placed.y:.2f}"
    for at, relation, other_at in request.relations:
        one, reference = found[at], found[other_at]
        if one and reference and not _holds(one, relation, reference):
            yield f"{scene.things[at].form} not {relation}"
    if request.has_background and (reading.pattern, reading.background) != (scene.pattern, scene.background):
        yield f"background {reading.pattern} {reading.background}"


def _holds(one: Found, relation: str, other: Found) -> bool:
    across, down = other.x - one.x, other.y - one.y
    ahead = {"left": across, "right": -across, "above": down, "below": -down}[relation]
    aside = down if relation in ("left", "right") else across
    return ahead > 0.1 and ahead > abs(aside)


def table(requests: Sequence[Request], found: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Count right pictures by number of objects and by language: {group: {right, of, percent}}."""
    groups: dict[str, list[bool]] = {}
    for request, wrong in zip(requests, found, strict=True):
        count = len(request.scene.things)
        for group in (f"{count} object{'s' if count > 1 else ''}", request.language, "all"):
            groups.setdefault(group, []).append(not wrong)
    return {
        group: {"right": sum(each), "of": len(each), "percent": round(100 * sum(each) / len(each), 1)}
        for group, each in sorted(groups.items())
    }


def judge(
    sampler: Sampler, requests: Sequence[Request], *, batch: int = 8, seed: int = 0
) -> tuple[torch.Tensor, list[list[str]]]:
    """Draw every request with ``sampler``; return the pictures on the CPU, and the faults of each."""
    drawn = draw_requests(sampler, requests, batch=batch, seed=seed)
    return drawn, [faults(request, read(image)) for request, image in zip(requests, drawn, strict=True)]


def draw_requests(sampler: Sampler, requests: Sequence[Request], *, batch: int, seed: int = 0) -> torch.Tensor:
    """Draw every request with ``sampler``, in batches with noise of their own; return the pictures on the CPU."""
    parts = [(seed + at, requests[at : at + batch]) for at in range(0, len(requests), batch)]
    return torch.cat([sampler([each.text for each in part], number).float().cpu() for number, part in parts])


def judge_in_processes(given: argparse.Namespace, requests: Sequence[Request]) -> tuple[torch.Tensor, list[list[str]]]:
    """Do as :func:`judge` with diffusers, its batches in ``given.processes`` processes of one thread each.

    On a machine that others use, threads of these small layers wait for each other longer than they compute.
    """
    parts = [(at, requests[at : at + given.batch]) for at in range(0, len(requests), given.batch)]
    with ProcessPoolExecutor(given.processes, get_context("spawn"), _open_in_process, (given,)) as processes:
        judged = list(processes.map(_judge_in_process, parts))
    return torch.cat([torch.from_numpy(images) for images, _ in judged]), [
        each for _, found in judged for each in found
    ]


_sampler_of_process: Sampler


def _open_in_process(given: argparse.Namespace) -> None:
    global _sampler_of_process
    torch.set_num_threads(1)
    _sampler_of_process = _diffusers(given)


def _judge_in_process(part: tuple[int, Sequence[Request]]) -> tuple[Any, list[list[str]]]:
    at, requests = part
    images, found = judge(_sampler_of_process, requests, batch=len(requests), seed=at)
    return images.numpy(), found


def print_table(rows: dict[str, dict[str, float]]) -> None:
    for group, row in rows.items():
        print(f"{group:>10} {row['right']:5.0f} of {row['of']:4.0f} {row['percent']:6.1f} %", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Judge a model of shapes on sentences that training never saw.")
    parser.add_argument(
        "folder", type=_folder, help="a pipeline's folder; 'drawn' judges the drawn pictures themselves"
    )
    parser.add_argument("--daemon", action="store_true", help="draw with the workers of the running daemon of xditd")
    parser.add_argument(
        "--formats", nargs="*", metavar="FORMAT",
        help="a table: diffusers in --dtype, then the running daemon with the transformer in each of these formats "
        "(float32, bfloat16, float16, fp8, int8, q8_0; without names all but float16), or in bfloat16 with a "
        "step_cache, or eager, captured, compiled as its class",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of diffusers; a daemon has its own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sentences", type=whole(1), default=SENTENCES)
    parser.add_argument("--steps", type=whole(1), default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--text-tokens", type=int, default=T5_TOKENS)
    parser.add_argument("--batch", type=whole(1), default=8)
    parser.add_argument("--processes", type=whole(1), default=1, help="of diffusers on a CPU, each with one thread")
    parser.add_argument("--json", type=output_file(".json"), help="write the table and every picture's faults here")
    parser.add_argument("--sheet", type=output_file(".png"), help="write the pictures here, as one .png")
    given = parser.parse_args(arguments)
    if (given.daemon or given.formats is not None) and given.processes > 1:
        parser.error("--processes: of diffusers alone; leave it out")
    if given.daemon and (given.device, given.dtype) != ("cpu", "float32"):
        parser.error("--device, --dtype: of diffusers; a daemon has its own device, and the folder's dtype")
    requests = held_out_requests(given.sentences)
    started = time.monotonic()
    if given.formats is not None:
        _judge_formats(given, requests)
        return
    images, found = _judge(given, requests)
    rows = table(requests, found)
    print_table(rows)
    print(f"{time.monotonic() - started:.0f} s, at most {MAX_OBJECTS} objects a picture")
    if given.json:
        pictures = [
            {"text": request.text, "faults": wrong, "read": asdict(read(image))}
            for request, wrong, image in zip(requests, found, images, strict=True)
        ]
        given.json.write_text(json.dumps({"table": rows, "pictures": pictures}, ensure_ascii=False, indent=1))
    if given.sheet:
        save_sheet(images, given.sheet)


def _folder(text: str) -> Path:
    return Path(text) if text == "drawn" else pipeline_folder(text)


def _judge(given: argparse.Namespace, requests: Sequence[Request]) -> tuple[torch.Tensor, list[list[str]]]:
    if str(given.folder) == "drawn":
        scenes = {each.text: each.scene for each in requests}
        return judge(lambda texts, _: draw(encode([scenes[text] for text in texts])), requests)
    if given.daemon:
        from xditd.client import Pipeline

        with Pipeline.open(given.folder, wait_s=60.0) as pipe:
            return judge(daemon_sampler(pipe, **_options(given)), requests, batch=given.batch)
    if given.processes > 1:
        return judge_in_processes(given, requests)
    return judge(_diffusers(given), requests, batch=given.batch)


def _diffusers(given: argparse.Namespace) -> Sampler:
    pipeline = open_pipeline(given.folder, getattr(torch, given.dtype), given.device)
    return pipeline_sampler(pipeline, **_options(given))


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {"steps": given.steps, "guidance": given.guidance, "text_tokens": given.text_tokens}


def _judge_formats(given: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Judge diffusers and then every format in the daemon, on the same noise; print and write a row after each."""
    from shapes.judged_formats import (
        ACCELERATIONS,
        FORMATS,
        PATHS,
        PLAIN,
        accelerated_sampler,
        compared,
        lent_sampler,
        paths_of,
        print_format,
    )
    from xditd.client import Client

    formats = given.formats or FORMATS
    known = dict.fromkeys(FORMATS + PLAIN + PATHS)
    unknown = sorted(set(formats) - {*known})
    if unknown:
        raise SystemExit(f"--formats: {', '.join(unknown)} not known; use {', '.join(known)}")
    rows: dict[str, dict[str, Any]] = {}
    first: tuple[torch.Tensor, list[object]] | None = None

    def add(name: str, sampler: Sampler) -> None:
        nonlocal first
        images = draw_requests(sampler, requests, batch=given.batch)
        read_back = [read(image) for image in images]
        found = [faults(request, reading) for request, reading in zip(requests, read_back, strict=True)]
        readings = [_coarse(each) for each in read_back]
        first = first or (images, readings)
        rows[name] = compared(table(requests, found), images, readings, first) | {"paths_so_far": paths_of(client)}
        print_format(name, rows[name], is_first=len(rows) == 1)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1))

    with Client(wait_s=60.0) as client, TemporaryDirectory() as scratch:
        add("diffusers", _diffusers(given))
        options = _options(given)
        batches = {len(requests[at : at + given.batch]) for at in range(0, len(requests), given.batch)}
        for name in formats:
            if name in ACCELERATIONS:
                pipeline = open_pipeline(given.folder, torch.bfloat16, given.device)
                drawing = accelerated_sampler(client, pipeline, name, pipeline_sampler(pipeline, **options), batches)
            else:
                drawing = lent_sampler(client, given.folder, name, Path(scratch), **options)
            with drawing as sampler:
                add(name, sampler)


def _coarse(reading: Reading) -> object:
    """Return what a reading names, without the numbers that rounding changes."""
    things = sorted((each.colour, each.form, each.size, each.cell) for each in reading.things)
    return things, reading.pattern, reading.background


if __name__ == "__main__":
    main()
