"""Time plugging a full-size FLUX.1 checkpoint into its model, beside ``load_state_dict(assign=True)``.

    python benchmarks/run.py plugging

Tensors have full-size shapes but only one element of memory (expanded), so that this runs anywhere: plugging copies no
bytes, so its time does not depend on them.

Needs: nothing else
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable

import flux
import torch
from measuring import Report, print_table, repeat_ms

from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.process import xfuser_start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15)


def run(given: argparse.Namespace, report: Report) -> None:
    def median_ms(action: Callable[[], object]) -> float:
        return statistics.median(repeat_ms(action, given.repeats))

    with tempfile.TemporaryDirectory() as folder:
        layout = xfuser_start.start(0, 1, f"{folder}/store", torch.device("cpu"))

    from xditd.gpu_workers.models.model_cache import ModelCache

    tensors = {
        name: torch.zeros((), dtype=dtype).expand(shape)
        for name, (dtype, shape) in flux.shapes(flux.FULL.size, torch.bfloat16).items()
    }
    described = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    cache = ModelCache(layout)
    build_ms = repeat_ms(lambda: cache.match(described))[0]
    match = cache.match(described)
    bindings = match.bind(tensors)
    model = match.model
    rows = {
        "match, model built": build_ms,
        "match, names known": median_ms(lambda: cache.match(described)),
        "bind": median_ms(lambda: match.bind(tensors)),
        "plug": median_ms(lambda: model.plug(bindings)),
        "load_state_dict(assign=True)": median_ms(lambda: model.module.load_state_dict(bindings, assign=True)),
    }
    xfuser_start.stop()
    report.add(ms=rows)
    title = f"{len(tensors)} checkpoint tensors, {len(bindings)} parameters; medians"
    print_table(title, [(label, f"{took_ms:.2f} ms") for label, took_ms in rows.items()])
    print(f"  plug is {rows['load_state_dict(assign=True)'] / rows['plug']:.1f}x as fast as load_state_dict")
