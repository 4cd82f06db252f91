"""A program, not a test: forwards of Z-Image on one GPU and in each layout of two, beside diffusers' own class.

    python on_gpus.py OUT_FOLDER LAYOUT... [cpu]

For each layout and rank it writes ``<layout>-rank<N>.json``: for each case and dtype the relative error of every row
against the class in float32 on one GPU, and that of the class in the same dtype, which rounds as often. ``cpu`` is a
dry run without the large case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[3]
sys.path += [str(TESTS / "checkpoints"), str(TESTS / "gpu_workers" / "support")]

import z_image_models  # noqa: E402 - from one of these folders

SEED = 0
CONFIG = replace(z_image_models.SMALL, hidden=1024, refiners=1)

# name: text tokens of each row, latent height and width of each
CASES: dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    "usual": ((256,), ((128, 128),)),
    "odd text, padded image": ((77,), ((14, 18),)),
    "prompt and negative": ((150, 20), ((32, 32),) * 2),
    "three rows of other sizes": ((33, 64, 5), ((16, 24), (8, 8), (16, 24))),
}


def run_rank(rank: int, layout: str, kind: str, folder: str) -> None:
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.operations import Inputs
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cpu":
        torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, f"{folder}/{layout}.store", device, degrees, kernels="auto")
    import direct_jobs  # not before the group is started

    rounded = {
        name: tensor.to(device)
        for name, tensor in z_image_models.state_dict(SEED, CONFIG, dtype=torch.bfloat16).items()
    }
    exact = z_image_models.reference({name: tensor.float() for name, tensor in rounded.items()}, CONFIG, str(device))
    facts: dict[str, Any] = {
        "attention": started.attention_backend,
        "cases": {case: {} for case in CASES if kind == "cuda" or case != "usual"},
    }
    for dtype in (torch.bfloat16, torch.float32):
        state = {name: tensor.to(dtype) for name, tensor in rounded.items()}
        match = ModelCache(started).match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        match.model.plug(match.bind(state))
        plain = z_image_models.reference(state, CONFIG, str(device))
        for case in facts["cases"]:
            given = z_image_models.inputs(*CASES[case])
            given["t"] = given["t"].to(device)
            for name in ("x", "cap_feats"):
                # Exact in bfloat16, so that float32 is asked the same.
                given[name] = [each.to(torch.bfloat16).to(device, dtype) for each in given[name]]
            results = [direct_jobs.call(match.model, [Inputs(given)])[0][0] for _ in range(2)]
            with torch.no_grad():
                here = plain(**given, return_dict=False)[0]
                given |= {name: [each.float() for each in given[name]] for name in ("x", "cap_feats")}
                right = exact(**given, return_dict=False)[0]
            facts["cases"][case][str(dtype).removeprefix("torch.")] = {
                "errors": [z_image_models.relative_error(*pair) for pair in zip(results[0], right, strict=True)],
                "errors of the class": [z_image_models.relative_error(*pair) for pair in zip(here, right, strict=True)],
                "bits of the class": all(torch.equal(mine, its) for mine, its in zip(results[0], here, strict=True)),
                "same bits": all(map(torch.equal, *results)),
                "sum": sum(float(row.double().sum()) for row in results[0]),
            }
        match.model.unplug()
    Path(folder, f"{layout}-rank{rank}.json").write_text(json.dumps(facts, indent=1))
    xfuser_start.stop()


def main(folder: str, *given: str) -> None:
    from xditd.ipc.degrees import Degrees, parse_layout

    kind = "cpu" if "cpu" in given else "cuda"
    for layout in given:
        if layout != "cpu":
            ranks = Degrees(**parse_layout(layout)).world_size
            torch.multiprocessing.spawn(run_rank, (layout, kind, folder), nprocs=ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
