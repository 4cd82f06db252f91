"""Time FLUX.1-dev with LoRAs as branches: steps by number and rank, and switches from job to job.

    python benchmarks/run.py lora --workers 1 2
    python benchmarks/run.py lora --formats bfloat16 float8 --counts 1 4 --lora-ranks 16 128 --json FILE
    python benchmarks/run.py lora --acceleration captured
    python benchmarks/run.py lora --device cpu --small

Random weights of full size are lent, and LoRAs of all layers of blocks, in kohya's names. Prints the milliseconds of a
step (median) with so many LoRAs of each rank, their ratio to a step without, the milliseconds of a switch, which the
workers measure, of the first job of a LoRA (its layers are found, and its factors converted) and of baking one into the
weights on the first GPU, for comparison; which blocks ran, and how many of the timed forwards were CUDA graphs.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import flux
import torch
from machine import temporary_folder
from measuring import Report, add_device, add_ranks, need_gpus, print_table
from parts.packed_steps import FORMATS, blocks_of, pack

from xditd.client import Client, Loan, LoanWithLoras
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.tensors import Acceleration

State = dict[str, torch.Tensor]
SEED = 0
STRENGTH = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", nargs="+", default=["bfloat16"], choices=FORMATS, help="of the base")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4], help="LoRAs at once")
    parser.add_argument("--lora-ranks", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--steps", type=int, default=8, help="of one generation")
    parser.add_argument("--repeats", type=int, default=5, help="timed generations; the median counts")
    parser.add_argument("--acceleration", default="auto", choices=get_args(Acceleration), help="of the workers")
    parser.add_argument("--switches", type=int, default=50, help="between two LoRAs")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("lora", max(given.ranks), given.device)
    device = flux.device_of(given)
    plain = flux.state_dict(flux.scale_of(given).size, flux.dtype_on(given.device), device, SEED)
    size_bytes = sum(each.nbytes for each in plain.values())
    with tempfile.TemporaryDirectory(prefix="xditd-lora-", dir=temporary_folder(size_bytes)) as folder:
        for ranks in given.ranks:
            measure_daemon(given, report, plain, Path(folder), ranks)


def measure_daemon(given: argparse.Namespace, report: Report, plain: State, folder: Path, ranks: int) -> None:
    flags = ["--acceleration", given.acceleration]
    daemon = DaemonProcess(folder / "daemon.log", ranks, given.device, flags)
    client = None
    found: dict[str, dict[str, Any]] = {}
    try:
        client = daemon.connect()
        client.wait_ready(300.0)
        for name in given.formats:
            dtype = str(flux.dtype_on(given.device)).removeprefix("torch.")
            loan = client.lend(pack(plain, name, folder), compute_dtype=None if name == "bfloat16" else dtype)
            without = step_ms_of(given, client, loan)
            found[name] = {"step_ms": round(without, 2), "ratio": 1.0, "blocks": blocks_of(client.status())}
            for rank in given.lora_ranks:
                found.update(measure_rank(given, client, loan, plain, rank, without, name))
            loan.return_()
            report.add(**{f"{ranks} workers": found})
    finally:
        daemon.stop(client)
    columns = list(dict.fromkeys(column for each in found.values() for column in each))
    rows = [(label, *(str(each.get(column, "")) for column in columns)) for label, each in found.items()]
    print_table(f"{ranks} worker(s)", [("base and LoRAs", *columns), *rows])


def measure_rank(
    given: argparse.Namespace, client: Client, loan: Loan, plain: State, rank: int, without: float, name: str
) -> dict[str, dict[str, Any]]:
    """Measure LoRAs of one rank on one base."""
    found: dict[str, dict[str, Any]] = {}
    states = [lora_state(plain, rank, number) for number in range(max(given.counts))]
    loras = [client.lend_lora(state, label=f"lora {number}") for number, state in enumerate(states)]
    for count in given.counts:
        view = loan.with_loras([(lora, STRENGTH) for lora in loras[:count]])
        began = time.perf_counter()
        generate(given, client, view, 1)
        first_ms = (time.perf_counter() - began) * 1e3
        before = client.status().loras
        each = step_ms_of(given, client, view)
        after = client.status().loras
        found[f"{name}, {count} of rank {rank}"] = {
            "step_ms": round(each, 2),
            "ratio": round(each / without, 3),
            "blocks": blocks_of(client.status()),
            "first_job_ms": round(first_ms, 1),
            "captured": f"{after.launched - before.launched} of {after.forwards - before.forwards}",
            "factors_mib": round(after.memory_bytes / 2**20),
        }
    switches = []
    for number in range(given.switches):
        generate(given, client, loan.with_loras([(loras[number % len(loras)], STRENGTH)]), 1)
        switches.append(client.status().loras.last_switch_ms)
    began = time.perf_counter()
    bake(plain, states[0])
    found[f"{name}, {given.counts[-1]} of rank {rank}"] |= {
        "switch_ms": round(statistics.median(switches), 3),
        "slowest_switch_ms": round(max(switches), 3),
        "bake_ms": round((time.perf_counter() - began) * 1e3, 1),
        "why_other_path": client.status().loras.detail,
    }
    for lora in loras:
        lora.return_()
    return found


def lora_state(plain: State, rank: int, seed: int) -> State:
    """Make a LoRA of all layers of blocks, in kohya's names."""
    found: State = {}
    for name, weight in plain.items():
        if weight.ndim == 2 and name.startswith(("double_blocks.", "single_blocks.")):
            layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            down, up = weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
            found[f"{layer}.lora_down.weight"] = down.normal_(0.0, weight.shape[1] ** -0.5)
            found[f"{layer}.lora_up.weight"] = up.normal_(0.0, 0.2 * rank**-0.5)
            found[f"{layer}.alpha"] = torch.tensor(float(rank) + seed)
    return found


@torch.no_grad()
def bake(plain: State, lora: State) -> None:
    """Compute each changed weight, as loaders do that merge a LoRA."""
    for name, weight in plain.items():
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.alpha" in lora:
            difference = lora[f"{layer}.lora_up.weight"].float() @ lora[f"{layer}.lora_down.weight"].float()
            (weight.float() + STRENGTH * difference).to(weight.dtype)
    if plain["img_in.weight"].is_cuda:
        torch.cuda.synchronize()


def step_ms_of(given: argparse.Namespace, client: Client, component: Loan | LoanWithLoras) -> float:
    generate(given, client, component, given.steps)
    generate(given, client, component, given.steps)
    return statistics.median(generate(given, client, component, given.steps) for _ in range(given.repeats))


def generate(given: argparse.Namespace, client: Client, component: Loan | LoanWithLoras, steps: int) -> float:
    """Generate once; return the milliseconds of a step."""
    scale, device = flux.scale_of(given), flux.device_of(given)
    torch.manual_seed(SEED)
    prompt, pooled = (torch.randn(1, *shape, device=device) for shape in ((scale.tokens, 4096), (768,)))
    noise = torch.randn(1, 16, scale.pixels // 8, scale.pixels // 8, device=device)
    began = time.perf_counter()
    client.generate(
        component,
        {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled},
        height=scale.pixels,
        width=scale.pixels,
        steps=steps,
        noise=noise,
    ).result()
    return (time.perf_counter() - began) * 1e3 / steps
