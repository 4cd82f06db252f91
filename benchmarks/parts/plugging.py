"""Plugging a full-size FLUX.1 checkpoint into its skeleton, beside ``load_state_dict(assign=True)``.

    python benchmarks/plugging.py

Tensors have full-size shapes and no memory of their own (one element, expanded), so that this runs anywhere: plugging
moves no bytes, and what it costs does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import flux_weights
import torch
from machine import describe_machine

from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.process import xfuser_start


def median_ms(action: Callable[[], object], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        took.append((time.perf_counter() - started) * 1e3)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the plugging of a full-size checkpoint, part by part.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layout = xfuser_start.start(0, 1, f"{folder}/store", torch.device("cpu"))

    from xditd.gpu_workers.models.skeletons import SkeletonCache

    tensors = {
        name: torch.zeros((), dtype=dtype).expand(shape)
        for name, (dtype, shape) in flux_weights.shapes(flux_weights.FULL, torch.bfloat16).items()
    }
    described = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    cache = SkeletonCache(layout)
    started = time.perf_counter()
    plan = cache.plan(described)
    build_ms = (time.perf_counter() - started) * 1e3
    bindings = plan.bind(tensors)
    skeleton = plan.skeleton
    rows = {
        "plan, skeleton built": build_ms,
        "plan, layout known": median_ms(lambda: cache.plan(described), given.repeats),
        "bind": median_ms(lambda: plan.bind(tensors), given.repeats),
        "plug": median_ms(lambda: skeleton.plug(bindings), given.repeats),
        "load_state_dict(assign=True)": median_ms(
            lambda: skeleton.module.load_state_dict(bindings, assign=True), given.repeats
        ),
    }
    xfuser_start.stop()
    if given.json:
        print(json.dumps({"machine": describe_machine(), "ms": rows}))
        return
    machine = describe_machine()
    print(f"{machine['cpu']}; Python {machine['python']}; torch {machine['versions']['torch']}")
    print(f"{len(tensors)} checkpoint tensors, {len(bindings)} parameters")
    for label, took_ms in rows.items():
        print(f"  {label:30s} {took_ms:8.2f} ms")
    print(f"  plug is {rows['load_state_dict(assign=True)'] / rows['plug']:.1f}x as fast as load_state_dict")


if __name__ == "__main__":
    main()
