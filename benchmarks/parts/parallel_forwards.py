"""Time one forward over several GPUs without xditd: diffusers' ``enable_parallelism``, or xfuser's wrappers of classes.

    python benchmarks/run.py parallel_forwards --workers 2
    python benchmarks/run.py parallel_forwards --with xfuser --models flux1 wan --workers 2 4 --json FILE
    python benchmarks/run.py parallel_forwards --device cpu --small --workers 2

The models and arguments are those of the part ``modules``, which times the same calls through ``accelerate``. Weights
are random, made on each GPU. Both split tokens by Ulysses; on one GPU diffusers runs the class alone. Prints the median
of one forward in ms, with ``--compiled`` also after ``compile_repeated_blocks``, or why there is none: not every class
has a plan in diffusers, or a wrapper in xfuser.

Needs: as many GPUs as --workers; --device cpu --small is a dry run (diffusers' parallelism needs GPUs)
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from measuring import Report, add_device, add_ranks, need_gpus, print_table, run_on_ranks, synchronize
from parts.modules import MODELS, Arguments, Subjects, build
from parts.rival import import_all_of_xfuser

WARM_UP = 2
WRAPPERS = {
    "FluxTransformer2DModel": ("transformer_flux", "xFuserFlux1Transformer2DWrapper"),
    "QwenImageTransformer2DModel": ("transformer_qwen", "xFuserQwenImageTransformerWrapper"),
    "Flux2Transformer2DModel": ("transformer_flux2", "xFuserFlux2Transformer2DWrapper"),
    "ZImageTransformer2DModel": ("transformer_z_image", "xFuserZImageTransformer2DWrapper"),
    "WanTransformer3DModel": ("transformer_wan", "xFuserWanTransformer3DWrapper"),
}
"""Of xfuser: for a class of diffusers, the module and the wrapper."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--with", dest="runner", default="diffusers", choices=tuple(STARTS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--compiled", action="store_true", help="time compiled blocks, too")
    parser.add_argument("--calls", type=int, default=9, help="timed calls of each; 3 of wan")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> int:
    for ranks in given.ranks:
        need_gpus("parallel_forwards", ranks, given.device)
        found = run_on_ranks(time_models, ranks, given)[0]
        report.add(**{f"{given.runner}, {ranks} GPUs": found})
        rows = [
            (
                name,
                *(str(each.get(key, "-")) for key in ("median_ms", "compiled_ms", "compile_s")),
                each.get("fault", ""),
            )
            for name, each in found.items()
        ]
        print_table(f"{given.runner} on {ranks} GPUs", [("model", "ms", "compiled ms", "made in s", ""), *rows])
    return 0


def time_models(rank: int, ranks: int, store: str, given: argparse.Namespace) -> dict[str, Any]:
    """Time the models, one after the other, in one of the processes."""
    is_cuda = given.device == "cuda"
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    make = STARTS[given.runner](rank, ranks, store, device)
    found: dict[str, Any] = {}
    for name in given.models:
        found[name] = time_model(make, name, ranks, device, given)
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    return found


Make = Callable[[str, Arguments, torch.dtype], torch.nn.Module]
"""Builds a class of diffusers, by name, with a configuration, so that its forward runs over all ranks."""


def start_diffusers(rank: int, ranks: int, store: str, device: torch.device) -> Make:
    from diffusers import ContextParallelConfig

    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)

    def make(class_name: str, config: Arguments, dtype: torch.dtype) -> torch.nn.Module:
        model: Any = build(class_name, config, device, dtype)
        if ranks > 1:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        return model

    return make


def start_xfuser(rank: int, ranks: int, store: str, device: torch.device) -> Make:
    from xditd.gpu_workers.process import xfuser_start

    import_all_of_xfuser(device)
    xfuser_start.start(rank, ranks, store, device)

    def make(class_name: str, config: Arguments, dtype: torch.dtype) -> torch.nn.Module:
        module, wrapper = WRAPPERS[class_name]
        found = importlib.import_module(f"xfuser.model_executor.models.transformers.{module}")
        return build(getattr(found, wrapper), config, device, dtype)

    return make


STARTS = {"diffusers": start_diffusers, "xfuser": start_xfuser}


def median_ms(
    model: torch.nn.Module, arguments: Arguments, name: str, device: torch.device, given: argparse.Namespace
) -> float:
    times_ms = []
    for _ in range(WARM_UP + (min(given.calls, 3) if name == "wan" else given.calls)):
        synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        model(**arguments, return_dict=False)  # diffusers cannot gather results in its output classes
        synchronize(device)
        times_ms.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times_ms[WARM_UP:])


@torch.no_grad()
def time_model(make: Make, name: str, ranks: int, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """Return the median of one forward, or the first line of the error of a model that does not run."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    class_name, config, make_arguments = getattr(Subjects(device, dtype, small=given.small), name)()
    found: dict[str, Any] = {"class": class_name}
    try:
        model = make(class_name, config, dtype)
        torch.manual_seed(0)
        arguments = make_arguments()  # the same on every rank
        found["median_ms"] = round(median_ms(model, arguments, name, device, given), 1)
        if given.compiled:
            began = time.perf_counter()
            torch.compiler.reset()
            model.compile_repeated_blocks(fullgraph=False)
            model(**arguments, return_dict=False)
            synchronize(device)
            found["compile_s"] = round(time.perf_counter() - began, 1)
            found["compiled_ms"] = round(median_ms(model, arguments, name, device, given), 1)
    # Anything: the libraries have no plan, want counts that divide, or lack a part. All ranks fail alike.
    except Exception as error:  # noqa: BLE001
        found["fault"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        traceback.clear_frames(error.__traceback__)  # they hold the model
    return found
