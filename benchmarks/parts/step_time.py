"""Time one step of a full-size FLUX.1 with each way of running its blocks, without a daemon.

    python benchmarks/run.py step_time --workers 1 2
    python benchmarks/run.py step_time --ways plain fused --profile
    python benchmarks/run.py step_time --workers 2 --layout cfg=2 --rows 2 --ways plain fused

``plain`` are diffusers' modules in eager mode, ``compiled`` the same after ``compile_repeated_blocks``, ``fused`` the
blocks of ``families/flux1/fused.py``, ``captured`` the same as a CUDA graph, ``fp8`` fused ones with fp8 products,
which are not lossless. Weights are random, made on each GPU. Prints milliseconds of the slowest rank, the longest step
by the shortest, ratios, the relative error against the first way, and with ``--profile`` the time by kind of kernel.

Needs: as many GPUs as workers
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import flux
import torch
from kernel_profile import kind_of
from measuring import Report, add_ranks, need_gpus, print_table, run_on_ranks

from xditd.client.demo.flux1_calls import image_ids

LOSSLESS = ("plain", "compiled", "fused", "captured")
WAYS = (*LOSSLESS, "fp8")
PARITY_STEPS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ranks(parser)
    parser.add_argument("--ways", nargs="+", default=list(LOSSLESS), choices=WAYS)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="timed forwards; the median counts")
    parser.add_argument("--small", action="store_true", help="a tiny transformer: a dry run")
    parser.add_argument("--rows", type=int, default=1, help="images in one forward; 2: a prompt and a negative one")
    parser.add_argument("--layout", default="auto", help="a layout as in xditd serve, such as ring=2")
    parser.add_argument("--attention", default="auto", help="an xDiT attention backend by name")
    parser.add_argument("--profile", action="store_true", help="sum a step's kernels by kind")


def run_rank(rank: int, ranks: int, store: str, given: argparse.Namespace) -> dict[str, Any]:
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import parse_layout
    from xditd.ipc.layout_choice import choose_layout

    device = torch.device("cuda", rank)
    degrees = choose_layout(ranks, parse_layout(given.layout)).degrees
    precision = "fp8" if "fp8" in given.ways else "bf16"
    kernels = "fused" if {"fused", "captured", "fp8"} & set(given.ways) else "plain"
    layout = xfuser_start.start(rank, ranks, store, device, degrees, given.attention, kernels, precision=precision)
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.models.operations import CallOptions
    from xditd.gpu_workers.parallel import component_layouts

    state = flux.state_dict(flux.scale_of(given).size, torch.bfloat16, device, 0)
    modules: dict[str, Any] = {}
    for way in dict.fromkeys(("plain", *given.ways)):
        as_plain = modules.get("plain") if way in ("compiled", "fused") else None
        if as_plain is None:
            accelerated = dataclasses.replace(
                layout,
                precision=precision if way == "fp8" else "bf16",
                acceleration="captured" if way == "captured" else "eager",
            )
            match = ModelCache(accelerated).match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
            match.model.plug(match.bind(state), "a", match.by_canonical_name(state))
        modules[way] = match.model.module if as_plain is None else as_plain
    fast = {way: modules[way].fused for way in given.ways if way in ("fused", "captured", "fp8")}
    component_layouts.use(match.model.layout)
    inputs, options = make_inputs(given, device), CallOptions()

    @torch.inference_mode()
    def step() -> torch.Tensor:
        return module.forward_rows(**inputs, options=options)

    module = modules["plain"]
    found: dict[str, Any] = {
        "layout": str(degrees),
        "attention": f"{layout.attention_backend}, fused {layout.fused_attention}",
        "ways": {},
    }

    @torch.inference_mode()
    def few_steps() -> torch.Tensor:
        """Run twelve Euler steps from noise, for the error that a job would have."""
        moved = dict(inputs)
        for number in range(PARITY_STEPS):
            moved["timestep"] = torch.full((given.rows,), 1.0 - number / PARITY_STEPS, device=device)
            moved["hidden_states"] = (
                moved["hidden_states"] - module.forward_rows(**moved, options=options) / PARITY_STEPS
            )
        return moved["hidden_states"].float()

    expected: tuple[torch.Tensor, torch.Tensor] | None = None
    for way in given.ways:
        module = modules[way]
        module.fused = fast.get(way)
        started = time.perf_counter()
        if way == "compiled":
            module.compile_repeated_blocks(fullgraph=False)
        result = step().float()
        torch.cuda.synchronize()
        first_s = time.perf_counter() - started
        results = (result, few_steps())
        if way in fast:
            fast[way].paths.decide()
        expected = results if expected is None else expected
        errors = [float((one - other).norm() / other.norm()) for one, other in zip(results, expected, strict=True)]
        entry: dict[str, Any] = {
            "first_s": first_s,
            "ms": time_steps(step, given.steps),
            "error": errors[0],
            "error_after_steps": errors[1],
            "same_bits_again": bool(torch.equal(results[1], few_steps())),
            "refused": way in fast and fast[way].check.is_refused,
            "paths": [f"{each.path} {each.detail}" for each in fast[way].paths.take_reports()] if way in fast else [],
        }
        if given.profile:
            entry["profile"] = profile(step)
        found["ways"][way] = entry
    torch.cuda.synchronize()
    xfuser_start.stop()
    return found


def make_inputs(given: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.bfloat16, device=device)

    side = given.pixels // 16
    return {
        "hidden_states": random(given.rows, side * side, 64),
        "encoder_hidden_states": random(given.rows, given.tokens, 4096),
        "pooled_projections": random(given.rows, 768),
        "timestep": torch.full((given.rows,), 0.5, device=device),
        "guidance": torch.full((given.rows,), 3.5, device=device),
        "txt_ids": torch.zeros(given.tokens, 3, device=device),
        "img_ids": image_ids(2 * side, 2 * side).tensor.to(device),
    }


def time_steps(step: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each step by events, the host running ahead as it does in a job."""
    for _ in range(3):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def profile(step: Callable[[], object]) -> dict[str, Any]:
    """Return the milliseconds of one step's kernels by kind, and the longest kernels by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in recorded.key_averages():
        took_ms = event.self_device_time_total / 1e3
        kinds[kind_of(event.key)] += took_ms
        names[event.key[:90]][0] += took_ms
        names[event.key[:90]][1] += event.count
    top = sorted(((took, int(count), name) for name, (took, count) in names.items()), reverse=True)[:16]
    return {"kinds_ms": dict(kinds), "kernels": sum(count for _, count in names.values()), "top": top}


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("step_time", max(given.ranks))
    report.add(groups=[])
    for ranks in given.ranks:
        found = run_on_ranks(run_rank, ranks, given)
        group: dict[str, Any] = {
            "ranks": ranks,
            "layout": found[0]["layout"],
            "attention": found[0]["attention"],
            "floor_ms": given.rows * flux.floor_ms(flux.scale_of(given).size, given.pixels, given.tokens) / ranks,
            "ways": {way: [each["ways"][way] for each in found] for way in given.ways},
        }
        report.add(groups=[*report.found["groups"], group])
        print_group(given, group)


def print_group(given: argparse.Namespace, group: dict[str, Any]) -> None:
    floor_ms = group["floor_ms"]
    slowest = {way: max(statistics.median(each["ms"]) for each in ranks) for way, ranks in group["ways"].items()}
    after = f"after {PARITY_STEPS}"
    rows = [("", "step", "spread", f"of {given.ways[0]}", "of the floor", "error", after, "first", "same bits again")]
    for way, ms in slowest.items():
        first = group["ways"][way][0]
        spread = max(max(each["ms"]) / min(each["ms"]) for each in group["ways"][way])
        times = (f"{ms:.1f} ms", f"{spread:.2f}", f"{ms / slowest[given.ways[0]]:.3f}x", f"{ms / floor_ms:.2f}x")
        errors = (f"{first['error']:.1e}", f"{first['error_after_steps']:.1e}")
        same = all(entry["same_bits_again"] for entry in group["ways"][way])
        refused = "  REFUSED: these are plain" if first["refused"] else ""
        paths = "".join(f"  {path}" for path in first["paths"])
        rows.append((way, *times, *errors, f"{first['first_s']:.1f} s", f"{same}{refused}{paths}"))
    about = f"{given.pixels}x{given.pixels}, {given.tokens} text tokens, {given.rows} row(s), floor {floor_ms:.1f} ms"
    print_table(f"{group['ranks']} rank(s), {group['layout']}, attention {group['attention']}; {about}", rows)
    for way, entries in group["ways"].items() if given.profile else ():
        profile = entries[0]["profile"]
        kinds = ", ".join(f"{kind} {took:.1f} ms" for kind, took in sorted(profile["kinds_ms"].items()))
        top = [(f"{took:.2f} ms", str(count), name) for took, count, name in profile["top"]]
        print_table(f"{way}, {profile['kernels']} kernels: {kinds}", top)
