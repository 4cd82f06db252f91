"""Time calls with large residuals of a ControlNet, in device memory and through host memory.

    python benchmarks/run.py device_io --workers 1 2

The daemon runs a ControlNet and a FLUX.1 transformer with few layers as their classes. ``arguments`` is a call of the
transformer with residuals on the caller's GPU, ``results`` a call of the ControlNet that returns as many; ``--mib`` is
their size together. The time includes the forward, which is the same on both ways.

Needs: as many GPUs as workers; --device cpu --small is a dry run, in which both ways are host memory
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Report, add_device, add_ranks, need_gpus, print_table, repeat_ms

from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc import limits

MIB = 2**20
LAYERS, WIDTH, TOKENS, TEXT_TOKENS, CHANNELS = 4, 1024, 1024, 16, 64
HOST_ONLY_FROM_BYTES = 2**60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ranks(parser)
    add_device(parser)
    parser.add_argument("--mib", type=int, default=512, help="MiB of all residuals")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls; the median counts")


def made(kind: str, device: str) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        module = getattr(diffusers, kind)(
            in_channels=CHANNELS,
            num_layers=LAYERS,
            num_single_layers=0,
            attention_head_dim=128,
            num_attention_heads=WIDTH // 128,
            joint_attention_dim=64,
            pooled_projection_dim=64,
        )
    found: torch.nn.Module = module.bfloat16().eval().requires_grad_(False)
    return found


def inputs(device: str, batch: int) -> dict[str, Any]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    return {
        "hidden_states": random(batch, TOKENS, CHANNELS),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, 64),
        "pooled_projections": random(batch, 64),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=torch.bfloat16),
        "img_ids": torch.zeros(TOKENS, 3, device=device),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device),
        "return_dict": False,
    }


def measure(given: argparse.Namespace, workers: int, mib: int) -> dict[str, dict[str, list[float]]]:
    """Return the milliseconds of each call, by what is large and by the way."""
    device = "cuda:0" if given.device == "cuda" else "cpu"
    batch = max(1, mib * MIB // (LAYERS * TOKENS * WIDTH * 2))
    plain = inputs(device, batch)
    shape = (batch, TOKENS, WIDTH)
    residuals = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(LAYERS)]
    with tempfile.TemporaryDirectory(prefix="xditd-device-io-") as folder:
        daemon, client = DaemonProcess(Path(folder, "daemon.log"), workers, given.device), None
        try:
            client = daemon.connect()
            daemon.wait_ready(client, lambda _: None)
            transformer = client.lend(made("FluxTransformer2DModel", device), as_class=True)
            controlnet = client.lend(made("FluxControlNetModel", device), as_class=True)
            with_residuals = {**plain, "controlnet_block_samples": residuals}
            with_image = {**plain, "controlnet_cond": plain["hidden_states"]}
            calls = {
                "arguments": partial(client.call, transformer, with_residuals),
                "results": partial(client.call, controlnet, with_image),
            }
            found = time_both_ways(calls, given.repeats, device)
            if given.device == "cuda" and client._pool.devices.idle_bytes < mib * MIB:
                raise SystemExit("device_io: the calls went through host memory; the client's log says why")
            return found
        finally:
            daemon.stop(client)


def time_both_ways(
    calls: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, dict[str, list[float]]]:
    """Time each call as it is, then with a threshold that no tensor reaches."""
    found: dict[str, dict[str, list[float]]] = {what: {} for what in calls}
    large_from = limits.DEVICE_IO_FROM_BYTES
    for way, from_bytes in (("device", large_from), ("host", HOST_ONLY_FROM_BYTES)):
        limits.DEVICE_IO_FROM_BYTES = from_bytes  # type: ignore[misc]
        try:
            for what, call in calls.items():
                found[what][way] = repeat_ms(call, repeats, device=device, warm_ups=3)
        finally:
            limits.DEVICE_IO_FROM_BYTES = large_from  # type: ignore[misc]
    return found


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("device_io", max(given.ranks), given.device)
    mib = 8 if given.small else given.mib
    report.add(mib=mib, groups=[])
    for workers in given.ranks:
        found = measure(given, workers, mib)
        report.add(groups=[*report.found["groups"], {"workers": workers, "ms": found}])
        rows = [("", "device memory" if given.device == "cuda" else "host memory, dry run", "host memory")]
        for what, ways in found.items():
            rows.append((what, *(f"{statistics.median(ways[way]):.1f} ms" for way in ("device", "host"))))
        print_table(f"{workers} worker(s), a call with residuals of {mib} MiB, bfloat16", rows)
