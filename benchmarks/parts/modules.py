"""Time calls of diffusers' own transformers through ``accelerate``, beside the same class in this process.

    python benchmarks/run.py modules                                   # five models of full size
    python benchmarks/run.py modules --models flux1 wan --json FILE
    python benchmarks/run.py modules --acceleration eager captured auto --workers 1 2
    python benchmarks/run.py modules --sizes standard large --workers 1 2 4 --json FILE    # for the part speedup
    python benchmarks/run.py modules --models flux1 --workers 1 --calls 50 --loops 16       # on a host with other load
    python benchmarks/run.py modules --device cpu --small

Weights are random, made on the first GPU. The class in this process and the daemon's worker use the same tensors, in
turns. Prints the medians of one call in ms and their ratio, one of calls in a row (``in_a_row_ms``), the time to lend,
the memory that the worker takes, whether the results have the same bits, the spread of calls (longest by shortest; in
turns, and ``in_a_row_spread``), and the processor time of the busiest worker for each call (``host_ms``). With
``--loops`` other programs use the processors meanwhile. Calls are timed once the workers have chosen how the model
runs; ``ready_s`` is when they had: a second run of this command finds compiled graphs on disk. With
``--swap`` two models of the class are called in turns; ``swap`` has the first calls of a turn by the last one, medians
of the turns from the third on, and the GPU memory that these took more. With ``--profile`` each rank's kernels of one
call are summed up, with the share of its time in which none runs (``gaps``), these by their length, and the three
longest with the kernels around them.

Needs: one GPU for each worker (78 GiB for flux2); --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import torch
from kernel_profile import KernelRecorder, summarise
from machine import gpu_memory_by_process
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table, synchronize
from module_subjects import MODELS, SIZES, Arguments, Subjects

from xditd.client import Client, accelerate
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.status import ForwardPath, SplitCheck
from xditd.ipc.tensors import Acceleration

SEED = 0
SETTLES_WITHIN_S = 240.0
SWAPS, CALLS_A_TURN = 10, 4
PROFILED_CALLS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--acceleration", nargs="+", default=["auto"], choices=get_args(Acceleration), help="one after the other"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["standard"], choices=SIZES, help="2048 pixels and 720p are large"
    )
    parser.add_argument("--swap", action="store_true", help="two models of each class in turns: twice the memory")
    parser.add_argument("--profile", action="store_true", help="sum up the kernels of a call; needs GPUs")
    parser.add_argument("--calls", type=int, default=9, help="timed calls of each, in turns; 3 of wan")
    parser.add_argument("--loops", type=int, default=0, metavar="N", help="N endless loops beside the timed calls")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> int:
    with tempfile.TemporaryDirectory(prefix="xditd-modules-") as folder:
        for ranks in given.ranks:
            need_gpus("modules", ranks, given.device)
            recorder = KernelRecorder(Path(tempfile.mkdtemp(dir=folder)))
            with recorder.in_path() if given.profile else nullcontext():
                daemon = DaemonProcess(Path(folder, f"daemon{ranks}.log"), ranks, given.device)
            client = None
            try:
                client = daemon.connect()
                client.wait_ready(300.0)
                found = {}
                for name, size in product(given.models, given.sizes):
                    label = name if size == "standard" else f"{name} {size}"
                    for acceleration, each in measure(name, size, given, client, recorder).items():
                        found[label, acceleration] = each
                        report.add(**{f"{label}, {acceleration}, {ranks} workers": each})
                    print_profiles({names: each.pop("profile", {}) for names, each in found.items()})
                rows = [(*names, *map(str, each.values())) for names, each in found.items()]
                print_table(f"{ranks} workers", [("model", "acceleration", *next(iter(found.values()))), *rows])
            finally:
                daemon.stop(client)
    return 0


def build(
    of: str | type, config: Arguments, device: torch.device, dtype: torch.dtype, seed: int = SEED
) -> torch.nn.Module:
    """Build a model of a class, or of one of diffusers by name, with random weights on the device.

    Tables that are no parameters have their values.
    """
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = (getattr(diffusers, of) if isinstance(of, str) else of)(**config)
    torch.manual_seed(seed)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, device=device, dtype=dtype)
                # As trained models have them: norms near 1, products that keep the size of their inputs. With other
                # random weights a deep model makes ten times as much of its roundings.
                if parameter.ndim > 1:
                    values.normal_(0.0, (3 * parameter[0].numel()) ** -0.5)
                else:
                    values.normal_(1.0 if name == "weight" else 0.0, 0.02)
                module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


@torch.no_grad()
def measure(
    name: str, size: str, given: argparse.Namespace, client: Client, recorder: KernelRecorder
) -> dict[str, dict[str, Any]]:
    """Time calls of one model here and in the workers, in turns; by acceleration."""
    device = torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    class_name, config, make = getattr(Subjects(device, dtype, small=given.small, size=size), name)()
    model = build(class_name, config, device, dtype)
    arguments = make()
    calls = min(given.calls, 3) if name == "wan" else given.calls
    model(**arguments)  # a class may make tables in its first forward: the module would be lent again
    profiler = recorder if given.profile else None
    found = {
        each: measure_with(each, model, arguments, calls, given.loops, client, profiler) for each in given.acceleration
    }
    if given.swap:
        other = build(class_name, config, device, dtype, seed=SEED + 1)
        other(**arguments)
        for each in given.acceleration:
            found[each]["swap"] = swap(each, [model, other], arguments, client)
        del other
    del model, arguments
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def measure_with(
    acceleration: Acceleration,
    model: torch.nn.Module,
    arguments: Arguments,
    calls: int,
    loops: int,
    client: Client,
    recorder: KernelRecorder | None,
) -> dict[str, Any]:
    workers = {worker.pid for worker in client.status().workers}
    before = worker_bytes(workers)
    began = time.perf_counter()
    with accelerate(model, client=client, acceleration=acceleration):  # builds the class in the worker
        first_lend_ms = (time.perf_counter() - began) * 1e3
    began = time.perf_counter()
    with accelerate(model, client=client, acceleration=acceleration):
        lend_ms = (time.perf_counter() - began) * 1e3
        lent = worker_bytes(workers) - before
        ready_s = settle(model, arguments, client, acceleration)
        with endless_loops(loops):
            host_s = {pid: processor_s(pid) for pid in workers}
            here_ms, there_ms, results = time_in_turns(model, arguments, calls)
            in_a_row = time_in_a_row(model, arguments, calls)
            busiest_s = max(processor_s(pid) - before_s for pid, before_s in host_s.items())
        profiles = {}
        if recorder is not None:
            recorded = recorder.record(workers, lambda: time_in_a_row(model, arguments, 1), PROFILED_CALLS)
            profiles = {f"rank {number}": summarise(recorded[pid]) for number, pid in enumerate(sorted(recorded))}
    status, class_name = client.status(), type(model).__name__
    here, there = (first_tensor(result).float() for result in results)
    paths = [each for each in status.forward_paths if each.class_name == class_name]
    return {
        "here_ms": round(statistics.median(here_ms), 1),
        "call_ms": round(statistics.median(there_ms), 1),
        "in_a_row_ms": round(statistics.mean(in_a_row), 1),
        "ratio": round(statistics.median(there_ms) / statistics.median(here_ms), 3),
        "spread": round(max(there_ms) / min(there_ms), 2),
        "in_a_row_spread": round(max(in_a_row) / min(in_a_row), 2),
        "host_ms": round(busiest_s / (2 * calls) * 1e3, 1),
        "first_lend_ms": round(first_lend_ms, 1),
        "lend_ms": round(lend_ms, 1),
        "ready_s": round(ready_s, 1),
        "weights_gib": round(sum(each.nbytes for each in model.parameters()) / GIB, 2),
        "worker_took_gib": round(lent / GIB, 2),
        "same_bits": torch.equal(here, there),
        "error": round(float((there - here).norm() / here.norm()), 7),
        "split": ", ".join(split_of(each) for each in status.split_checks[-1:] if each.class_name == class_name),
        "path": path_of(paths[-1]) if paths and acceleration != "eager" else "eager",
        **({"profile": profiles} if profiles else {}),
    }


def time_in_turns(
    model: torch.nn.Module, arguments: Arguments, calls: int
) -> tuple[list[float], list[float], list[Any]]:
    """Return the milliseconds of forwards in this process and of calls, in turns, and the last result of each."""
    device = next(model.parameters()).device
    here_ms: list[float] = []
    there_ms: list[float] = []
    for _ in range(calls):
        results = []
        for call, into in ((type(model).forward, here_ms), (type(model).__call__, there_ms)):
            synchronize(device)
            began = time.perf_counter()
            results.append(call(model, **arguments))
            synchronize(device)
            into.append((time.perf_counter() - began) * 1e3)
    return here_ms, there_ms, results


def time_in_a_row(model: torch.nn.Module, arguments: Arguments, calls: int) -> list[float]:
    """Return the milliseconds of calls one after the other, as in a pipeline's loop."""
    device = next(model.parameters()).device
    synchronize(device)
    ends = [time.perf_counter()]
    for _ in range(calls):
        model(**arguments)
        synchronize(device)
        ends.append(time.perf_counter())
    return [(after - before) * 1e3 for before, after in pairwise(ends)]


@contextmanager
def endless_loops(number: int) -> Iterator[None]:
    """Run so many programs that only loop, of the priority of this one, until the block ends."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def settle(model: torch.nn.Module, arguments: Arguments, client: Client, acceleration: Acceleration) -> float:
    """Call the model until the workers have chosen how it runs, and once more; return the seconds that took."""
    began = time.perf_counter()
    known = client.status().forward_paths
    while time.perf_counter() - began < SETTLES_WITHIN_S:
        model(**arguments)
        new = [each for each in client.status().forward_paths if each not in known]  # the status has the newest alone
        is_done = new and (new[-1].detail or acceleration == "captured" or "compiled" in new[-1].path)
        if acceleration == "eager" or is_done or has_no_choice(model, acceleration):
            break
    took_s = time.perf_counter() - began
    for _ in range(2):  # kernels are chosen in the first calls
        type(model).forward(model, **arguments)
        model(**arguments)
    return took_s


def swap(
    acceleration: Acceleration, models: list[torch.nn.Module], arguments: Arguments, client: Client
) -> dict[str, float]:
    """Call two lent models of one class in turns.

    Return the calls of a turn by its last one, medians of the turns from the third on, and the GPU memory by which the
    busiest worker grew in these.
    """
    turns: list[list[float]] = []
    workers = {worker.pid for worker in client.status().workers}
    took: list[int] = []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(accelerate(model, client=client, acceleration=acceleration))
            settle(model, arguments, client, acceleration)
        device = next(models[0].parameters()).device
        for number in range(SWAPS):
            times_ms = []
            for _ in range(CALLS_A_TURN):
                synchronize(device)
                began = time.perf_counter()
                models[number % 2](**arguments)
                synchronize(device)
                times_ms.append((time.perf_counter() - began) * 1e3)
            turns.append(times_ms)
            took.append(worker_bytes(workers))
    stays_ms = statistics.median(turn[-1] for turn in turns)
    calls = zip(*turns[2:], strict=True)
    found = {f"call {number}": round(statistics.median(each) / stays_ms, 3) for number, each in enumerate(calls, 1)}
    return {**found, "grew_gib": round((took[-1] - took[1]) / GIB, 3)}


def print_profiles(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    for (name, acceleration), profiles in found.items():
        for rank, each in profiles.items():
            kinds = ", ".join(f"{kind} {took:.1f} ms" for kind, took in each["kinds_ms"].items())
            about = f"{each['length_ms']} ms, gaps {each['gaps']:.1%}, {each['kernels']} kernels: {kinds}"
            rows = [(f"{took:.2f} ms", str(count), kernel) for took, count, kernel in each["top"]]
            rows += [(f"{of['ms']:.3f} ms", str(of["count"]), f"gaps {size}") for size, of in each["gaps_of"].items()]
            rows += [
                (f"{took} us", "", f"gap from {before} to {after}") for took, before, after in each["largest_gaps"]
            ]
            print_table(f"{name}, {acceleration}, {rank}: {about}", rows)


def processor_s(pid: int) -> float:
    """Return the seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_no_choice(model: torch.nn.Module, acceleration: Acceleration) -> bool:
    """Return whether there is nothing to wait for: on the CPU, models are eager unless they are to be compiled."""
    return next(model.parameters()).device.type == "cpu" and acceleration != "compiled"


def split_of(check: SplitCheck) -> str:
    """Return how the workers share such calls, or why they do not."""
    return check.split if check.is_used else f"not by {check.split}: {check.detail}"


def path_of(path: ForwardPath) -> str:
    """Return how such a forward runs, what that took to make, and the GPU memory of one rank."""
    made = f"{path.path} in {path.took_s:.2f} s, {path.memory_bytes / GIB:.2f} GiB"
    if path.error is not None:
        made += f", error {path.error:.1e}"
    return f"{made} ({path.detail})" if path.detail else made


def worker_bytes(pids: set[int]) -> int:
    """Return the GPU memory of the workers, without what they map of other processes."""
    return sum(size for pid, size in gpu_memory_by_process().items() if pid in pids)


def first_tensor(result: Any) -> torch.Tensor:
    """Return the first tensor of a forward's result."""
    while not isinstance(result, torch.Tensor):
        result = next(iter(result.values())) if hasattr(result, "values") else result[0]
    return result
