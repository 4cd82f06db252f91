"""Time steps of FLUX.1-dev with packed weights through a daemon, beside the same weights in bfloat16.

    python benchmarks/run.py packed_steps --workers 1 2
    python benchmarks/run.py packed_steps --formats bfloat16 int8_convrot --native never --json FILE
    python benchmarks/run.py packed_steps --device cpu --small

Random weights of full size are made on the first GPU, packed there, and lent from there; those of GGUF from a file.
Prints for each format and setting of ``native_products`` the milliseconds of a step (median), its ratio to bfloat16 in
the same daemon, the error of the latents against bfloat16, what the lend took and copied, the GPU memory of the
busiest worker after the generations (what it allocated in all, and beyond bfloat16), and whether fused blocks ran.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import flux
import torch
from machine import gpu_memory_by_process, temporary_folder
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table

from xditd.client import Client
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.gpu_workers.packed.dequantise import hadamard
from xditd.ipc.settings.daemon import NativeProducts
from xditd.ipc.status import DaemonStatus

State = dict[str, torch.Tensor]
FORMATS = ("bfloat16", "float8", "int8", "int8_convrot", "q8_0")
NATIVE = ("never", "always")
GROUP, BLOCK = 256, 32
ALIGNMENT = 32
Q8_0, BF16, F32 = 8, 30, 0
"""The numbers of GGUF's types."""
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--native", nargs="+", default=list(NATIVE), choices=get_args(NativeProducts))
    parser.add_argument("--steps", type=int, default=8, help="of one generation")
    parser.add_argument("--repeats", type=int, default=5, help="timed generations; the median counts")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("packed_steps", max(given.ranks), given.device)
    device = flux.device_of(given)
    plain = flux.state_dict(flux.scale_of(given).size, flux.dtype_on(given.device), device, SEED)
    size_bytes = sum(each.nbytes for each in plain.values())
    with tempfile.TemporaryDirectory(prefix="xditd-packed-", dir=temporary_folder(size_bytes)) as folder:
        for ranks in given.ranks:
            for native in given.native:
                measure_daemon(given, report, plain, Path(folder), ranks, native)


def measure_daemon(
    given: argparse.Namespace, report: Report, plain: State, folder: Path, ranks: int, native: str
) -> None:
    flags = [f"--native-products={native}"]
    dtype = str(flux.dtype_on(given.device)).removeprefix("torch.")
    daemon = DaemonProcess(folder / "daemon.log", ranks, given.device, flags)
    client = None
    found: dict[str, dict[str, Any]] = {}
    try:
        client = daemon.connect()
        client.wait_ready(300.0)
        expected: torch.Tensor | None = None
        for name in dict.fromkeys(("bfloat16", *given.formats)):
            source = pack(plain, name, folder)
            each, latents = measure(given, client, source, "" if name == "bfloat16" else dtype)
            expected = latents if expected is None else expected
            each["error"] = float((latents - expected).norm() / expected.norm())
            each["ratio"] = round(each["step_ms"] / found.get("bfloat16", each)["step_ms"], 3)
            each["beyond_gib"] = round(each["worker_gib"] - found.get("bfloat16", each)["worker_gib"], 2)
            found[name] = each
            report.add(**{f"{name}, native {native}, {ranks} workers": each})
            del source
            if given.device == "cuda":
                torch.cuda.empty_cache()
    finally:
        daemon.stop(client)
    rows = [(name, *(shown(value) for value in each.values())) for name, each in found.items()]
    print_table(f"{ranks} worker(s), native products {native}", [("weights", *next(iter(found.values()))), *rows])


def measure(
    given: argparse.Namespace, client: Client, source: State | Path, compute_dtype: str
) -> tuple[dict[str, Any], torch.Tensor]:
    """Lend a checkpoint, generate, and give it back; return what was measured, and the latents in float32."""
    scale, device = flux.scale_of(given), flux.device_of(given)
    torch.manual_seed(SEED)
    prompt, pooled = (torch.randn(1, *shape, device=device) for shape in ((scale.tokens, 4096), (768,)))
    conditioning = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    noise = torch.randn(1, 16, scale.pixels // 8, scale.pixels // 8, device=device)
    began = time.perf_counter()
    loan = client.lend(source, compute_dtype=compute_dtype or None)
    lend_ms = (time.perf_counter() - began) * 1e3
    step_ms = []
    for number in range(given.repeats + 2):
        began = time.perf_counter()
        job = client.generate(
            loan, conditioning, height=scale.pixels, width=scale.pixels, steps=given.steps, noise=noise
        )
        latents = job.result().latents.float().cpu()
        if number >= 2:
            step_ms.append((time.perf_counter() - began) * 1e3 / given.steps)
    status = client.status()
    workers = {worker.pid for worker in status.workers}
    used = [size for pid, size in gpu_memory_by_process().items() if pid in workers]
    products = [f"{each.format}: {each.reference} / {each.native}" for each in status.packed_products]
    found = {
        "step_ms": round(statistics.median(step_ms), 2),
        "lend_ms": round(lend_ms, 1),
        "lent_gib": round(sum(loan.facts.bytes_by_dtype.values()) / GIB, 2),
        "copied_gib": round(loan.copied.total / GIB, 2),
        "scratch_gib": round(loan.facts.scratch_bytes / GIB, 3),
        "worker_gib": round(max(used, default=0) / GIB, 2),
        "products": ", ".join(products),
        "blocks": blocks_of(status),
    }
    loan.return_()
    return found, latents


def blocks_of(status: DaemonStatus) -> str:
    """Return the error of the newest check of fused blocks, whether they run, and the newest path."""
    checks = [
        f"{each.kernels} {'used' if each.is_used else 'refused'} ({shown(each.error)} of {each.tolerance:.1e})"
        for each in status.fused_checks[-1:]
    ]
    return ", ".join([*checks, *(each.path for each in status.forward_paths[-1:])])


def shown(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) and 0 < abs(value) < 1e-2 else str(value)


def pack(plain: State, name: str, folder: Path) -> State | Path:
    """Pack the matrices of a checkpoint; GGUF's into a file."""
    if name == "bfloat16":
        return plain
    if name == "q8_0":
        return write_q8_0(plain, folder / "model.gguf")
    packed: State = {}
    for key, tensor in plain.items():
        layer = key.removesuffix(".weight")
        if not is_packed(key, tensor):
            packed[key] = tensor
            continue
        values, scale, marker = quantise(tensor, name)
        packed[key], packed[f"{layer}.weight_scale"] = values, scale
        packed[f"{layer}.comfy_quant"] = torch.tensor([*json.dumps(marker).encode()], dtype=torch.uint8)
    return packed


def is_packed(key: str, tensor: torch.Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2 and not tensor.shape[1] % GROUP


def quantise(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]:
    wide = weight.float()
    if name == "float8":
        scale = wide.abs().amax() / 448
        return (wide / scale).to(torch.float8_e4m3fn), scale, {"format": "float8_e4m3fn"}
    marker: dict[str, Any] = {"format": "int8_tensorwise"}
    if name == "int8_convrot":
        marker |= {"convrot": True, "convrot_groupsize": GROUP}
        wide = (wide.view(len(wide), -1, GROUP) @ hadamard(GROUP, wide.device)).view(wide.shape)
    scale = wide.abs().amax(1, keepdim=True) / 127
    return (wide / scale).round().to(torch.int8), scale, marker


def write_q8_0(plain: State, path: Path) -> Path:
    """Write a GGUF file, one tensor after the other: a checkpoint may be larger than half of the memory."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    infos, end = [], 0
    for key, tensor in plain.items():
        kind = Q8_0 if is_packed(key, tensor) else BF16 if tensor.dtype == torch.bfloat16 else F32
        sides = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        infos.append(text(key) + sides + struct.pack("<IQ", kind, end))
        size = tensor.numel() // BLOCK * (BLOCK + 2) if kind == Q8_0 else tensor.nbytes
        end += math.ceil(size / ALIGNMENT) * ALIGNMENT
    pair = text("general.architecture") + struct.pack("<I", 8) + text("flux")
    start = b"GGUF" + struct.pack("<IQQ", 3, len(plain), 1) + pair + b"".join(infos)
    with path.open("wb") as file:
        file.write(start + bytes(-len(start) % ALIGNMENT))
        for key, tensor in plain.items():
            data = q8_0_blocks(tensor) if is_packed(key, tensor) else tensor.contiguous().view(-1).view(torch.uint8)
            file.write(data.cpu().numpy().data)
            file.write(bytes(-data.numel() % ALIGNMENT))
    return path


def q8_0_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Return blocks of 32 numbers: their scale in float16, and int8."""
    blocks = weight.float().view(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    values = (blocks / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], dim=1).view(-1)
