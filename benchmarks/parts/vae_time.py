"""Time the decode of FLUX.1's VAE at full size in three ways, without a daemon.

    python benchmarks/run.py vae_time --workers 1 2

``diffusers`` is one rank's decode as diffusers runs it, ``channels_last`` the same with activations in that memory
format, ``bands`` the decoder of ``split_decode.py`` over all ranks, or with the same code on one rank. Weights are
random. Prints milliseconds of the slowest rank, ratios to ``diffusers``, and the error against a decode in float32.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import flux
import torch
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table, repeat_ms, run_on_ranks

CHANNELS = (128, 256, 512, 512)
SMALL_CHANNELS = (64, 64, 64, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ranks(parser)
    add_device(parser)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15, help="timed decodes; the median counts")


def run_rank(rank: int, ranks: int, store: str, given: argparse.Namespace) -> dict[str, Any]:
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.process import xfuser_start

    device = flux.device_of(given, rank)
    layout = xfuser_start.start(rank, ranks, store, device)
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache

    channels = SMALL_CHANNELS if given.small else CHANNELS
    state = checkpoints.flux_vae_state_dict(0, channels=channels, encoder=False)
    cache = ModelCache(layout)

    def plugged(dtype: torch.dtype) -> Any:
        tensors = {name: tensor.bfloat16().to(device, dtype) for name, tensor in state.items()}
        match = cache.match({name: TensorInfo.of(tensor) for name, tensor in tensors.items()})
        match.model.plug(match.bind(tensors))
        return match.model

    side = given.pixels // 8
    latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)

    def decode_by(model: Any, latents: torch.Tensor, *, is_shared: bool = False) -> torch.Tensor:
        operations = model.operations
        scaling = operations.facts(model.config).latents.scaling
        image: torch.Tensor = next(operations.decode(model, latents, scaling, is_shared=is_shared))
        return image

    exact = decode_by(plugged(torch.float32), latents.float())
    model = plugged(torch.bfloat16)
    decodes: dict[str, Callable[[], torch.Tensor]] = {
        "diffusers": lambda: decode_by(model, latents),
        "channels_last": lambda: decode_by(model, latents.contiguous(memory_format=torch.channels_last)),
        "bands": lambda: decode_by(model, latents, is_shared=True),
    }
    found = {}
    for way, decode in decodes.items():
        if given.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        image = decode()
        found[way] = {
            "ms": repeat_ms(decode, given.repeats, device=device, warm_ups=2),
            "error": float((image.float() - exact).norm() / exact.norm()),
            "same_bits_again": torch.equal(decode(), image),
            "peak_bytes": torch.cuda.max_memory_allocated() if given.device == "cuda" else None,
        }
    xfuser_start.stop()
    return found


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("vae_time", max(given.ranks), given.device)
    report.add(pixels=given.pixels, groups=[])
    for ranks in given.ranks:
        found = run_on_ranks(run_rank, ranks, given)
        report.add(groups=[*report.found["groups"], {"ranks": ranks, "by_rank": found}])
        slowest = {way: max(statistics.median(each[way]["ms"]) for each in found) for way in found[0]}
        rows = [("", "time", "of diffusers", "error", "same bits again", "peak")]
        for way, ms in slowest.items():
            peak = found[0][way]["peak_bytes"]
            same = all(each[way]["same_bits_again"] for each in found)
            times = (f"{ms:.1f} ms", f"{ms / slowest['diffusers']:.3f}x", f"{found[0][way]['error']:.1e}")
            rows.append((way, *times, str(same), "" if peak is None else f"{peak / GIB:.2f} GiB"))
        print_table(f"{ranks} rank(s), {given.pixels}x{given.pixels}, bfloat16", rows)
