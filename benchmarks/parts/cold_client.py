"""A client that has just been started, against a daemon that is warm: from ``lend`` to its first image.

Makes weights of its own where ComfyUI would have loaded them, in arenas, before the clock starts. ``workers_part.py``
runs it; prints one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import checkpoint_files
import flux_weights
import scales
import torch
from measuring import add_arguments
from safetensors.torch import load_file

from xditd.client import Client
from xditd.client.arenas import Arena


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=10)
    given = parser.parse_args()
    scale, device = scales.named(given), scales.first_of(given.device)
    transformer = Arena(flux_weights.shapes(scale.size, scales.dtype_on(given.device)), device)
    flux_weights.fill(transformer.tensors, given.seed)
    vae = Arena.copy_of(load_file(given.files / checkpoint_files.VAE), device)
    inputs = load_file(given.files / checkpoint_files.INPUTS)
    if given.device == "cuda":
        torch.cuda.synchronize()

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
    found: dict[str, Any] = dict(zip(("connect_ms", "lend_ms", "lend_vae_ms", "image_ms"), took_ms, strict=True))
    print(json.dumps({**found, "steps": given.steps, "timings_ms": result.timings_ms, "lend_phases_ms": phases}))


if __name__ == "__main__":
    main()
