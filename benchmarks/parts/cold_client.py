"""A client that has just been started, against a daemon that is warm: from ``lend`` to its first image.

Makes weights of its own where ComfyUI would have loaded them, in arenas, before the clock starts. The part ``workers``
starts these, each a process of its own.

Needs: a daemon with ready workers (--runtime), and the files of the part files
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import flux
from measuring import Report, add_device, print_table, synchronize
from parts import files
from safetensors.torch import load_file

from xditd.client import Client
from xditd.client.arenas import Arena


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--runtime", type=Path, required=True, help="the daemon's runtime folder")
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=10)


def run(given: argparse.Namespace, report: Report) -> None:
    scale, device = flux.scale_of(given), flux.device_of(given)
    transformer = Arena(flux.shapes(scale.size, flux.dtype_on(given.device)), device)
    flux.fill(transformer.tensors, given.seed)
    vae = Arena.copy_of(load_file(given.files / files.VAE), device)
    inputs = load_file(given.files / files.INPUTS)
    synchronize(device)

    marks = [time.perf_counter()]
    with Client(given.runtime, name="cold client") as client:
        marks.append(time.perf_counter())
        lent = client.lend(transformer.tensors)
        marks.append(time.perf_counter())
        lent_vae = client.lend(vae.tensors)
        marks.append(time.perf_counter())
        result = client.generate(
            lent,
            {name: inputs[name] for name in ("prompt_embeds", "pooled_prompt_embeds")},
            vae=lent_vae,
            noise=inputs["noise"],
            height=scale.pixels,
            width=scale.pixels,
            steps=given.steps,
        ).result()
        marks.append(time.perf_counter())
        phases = dict(lent.timings_ms)
    took_ms = [(after - before) * 1e3 for before, after in itertools.pairwise(marks)]
    found = dict(zip(("connect_ms", "lend_ms", "lend_vae_ms", "image_ms"), took_ms, strict=True))
    report.add(**found, steps=given.steps, timings_ms=result.timings_ms, lend_phases_ms=phases)
    print_table("A cold client", [(name, f"{each:.1f}") for name, each in found.items()])
