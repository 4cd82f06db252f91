"""The main path at full size, beside plain diffusers and xfuser without a daemon, in one run.

    python benchmarks/main_path.py                 # FLUX.1-dev size on the GPUs of this machine
    python benchmarks/main_path.py --device cpu --small

The client process uses ``cudaMallocAsync`` as ComfyUI does. Weights are random, in checkpoint layout, and made on the
GPU. Prints a table with ratios; ``--json FILE`` writes all of it, machine and versions included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: the allocator that ComfyUI selects by default, under which torch itself refuses to share.
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
os.environ["PYTORCH_ALLOC_CONF"] = "backend:cudaMallocAsync"

import flux_weights
import torch
from machine import describe_machine, gpu_memory_by_process

from xditd.client import Client, Loan
from xditd.client.arenas import Arena
from xditd.ipc.errors import DaemonUnreachable
from xditd.ipc.status import GroupState

HERE = Path(__file__).resolve().parent
GIB = 2**30


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny transformer, small images: a dry run")
    parser.add_argument("--workers", type=int, nargs="*", help="group sizes (default: 1 and the number of GPUs)")
    parser.add_argument("--lends", type=int, default=7, help="lends on a built skeleton; the median counts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser


class Run:
    """One run of the benchmark: its sizes, its weights, and what was measured."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.pixels = 128 if given.small else 1024
        self.tokens = 16 if given.small else 512
        self.steps = 4 if given.small else 28
        self.parity_steps = 4 if given.small else 12
        self.dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
        self.size = flux_weights.SMALL if given.small else flux_weights.FULL
        self.report: dict[str, Any] = {"machine": describe_machine(), "rivals": {}, "groups": []}
        self.inputs = self._write_inputs()
        self._latents: dict[str, Path] = {}
        self._own_bytes = 0

    def _write_inputs(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        side = self.pixels // 8
        shapes = {
            "prompt_embeds": (1, self.tokens, 4096),
            "pooled_prompt_embeds": (1, 768),
            "noise": (1, 16, side, side),
        }
        inputs = {name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in shapes.items()}
        save_file(inputs, self.folder / "inputs.safetensors")
        return inputs

    def write(self) -> None:
        """Keep what was measured so far, should the rest fail."""
        if self.given.json is not None:
            self.given.json.write_text(json.dumps(self.report, indent=1) + "\n")

    def rival(self, name: str, ranks: int) -> None:
        """Run a rival in a process of its own, which gives its memory back when it ends."""
        say(f"rival: {name} with {ranks} rank(s)")
        latents = self.folder / f"{name}{ranks}.safetensors"
        command = [sys.executable, str(HERE / "rival.py"), name, "--ranks", str(ranks)]
        command += ["--device", self.given.device, "--pixels", str(self.pixels), "--steps", str(self.steps)]
        command += ["--parity-steps", str(self.parity_steps), "--repeats", str(self.given.repeats)]
        command += ["--inputs", str(self.folder / "inputs.safetensors"), "--latents", str(latents)]
        command += ["--small"] if self.given.small else []
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH")}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        found["step_ms"] = statistics.median(found["seconds"]) * 1e3 / self.steps
        self.report["rivals"][f"{name}{ranks}"] = found
        self._latents[f"{name}{ranks}"] = latents

    def group(self, workers: int) -> None:
        """Start a daemon with this many workers and walk the main path with it."""
        say(f"daemon with {workers} worker(s)")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH")}
        runtime = self.folder / f"run{workers}"
        started = time.perf_counter()
        command = [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(runtime)]
        command += ["--workers", str(workers), "--device", self.given.device]
        with (self.folder / f"daemon{workers}.log").open("w") as log:
            daemon = subprocess.Popen(command, env=environment, stderr=log)
        try:
            found = self._walk(workers, runtime, daemon, started)
            self.report["groups"].append(found)
            self.write()
        finally:
            daemon.terminate()
            daemon.wait(timeout=60)

    def _walk(self, workers: int, runtime: Path, daemon: subprocess.Popen[bytes], started: float) -> dict[str, Any]:
        client = connect(runtime, daemon)
        greeted_s = time.perf_counter() - started
        while (status := client.status()).group_state is GroupState.STARTING:
            time.sleep(0.05)
        found: dict[str, Any] = {
            "workers": workers,
            "seconds": {"daemon_answers": greeted_s, "workers_ready": time.perf_counter() - started},
            "parallel": status.parallel,
            "attention": status.attention_backend,
        }
        memory = {"workers_ready": self._extra_memory()}
        device = "cuda:0" if self.given.device == "cuda" else "cpu"
        arenas = [Arena(flux_weights.shapes(self.size, self.dtype), device) for _ in range(2)]
        for seed, arena in enumerate(arenas):
            flux_weights.fill(arena.tensors, seed)
        self._own_bytes = sum(arena.size_bytes for arena in arenas)
        found["lent_gib"] = arenas[0].size_bytes / GIB
        found["first_lend"] = lend_once(client, arenas[0])[1]
        memory["lent"] = self._extra_memory()
        loan, _ = lend_once(client, arenas[0])
        found["relend_unchanged_ms"] = timed_ms(lambda: client.lend(arenas[0].tensors, label="again").return_())
        lends = []
        for number in range(self.given.lends):
            other, measured = lend_once(client, arenas[1])
            lends.append(measured)
            if number < self.given.lends - 1:
                other.return_()
        found["lends"] = lends
        found["lend_ms"] = statistics.median(lend["total_ms"] for lend in lends)
        found["jobs"] = self._jobs(client, loan, workers)
        memory["ran"] = self._extra_memory()
        found["swap"] = self._swap(client, loan, other)
        found["memory"] = memory
        found["counters"] = {name: getattr(client.status().counters, name) for name in ("skeletons_built", "plugs")}
        client.close()
        for arena in arenas:
            arena.close()
        return found

    def _jobs(self, client: Client, loan: Loan, workers: int) -> dict[str, Any]:
        latents = self._generate(client, loan, self.parity_steps)[0]
        again = self._generate(client, loan, self.parity_steps)[0]
        runs = [self._generate(client, loan, self.steps) for _ in range(self.given.repeats)]
        steps_ms = [timings["steps"] / self.steps for _, timings, _ in runs]
        return {
            "step_ms": statistics.median(steps_ms),
            "whole_ms": statistics.median(whole for _, _, whole in runs),
            "timings": [timings for _, timings, _ in runs],
            "repeats_identically": bool(torch.equal(latents, again)),
            "parity": {
                name: self._parity(latents, name)
                for name in ("diffusers1", f"xfuser{workers}")
                if name in self._latents
            },
            "denoise_ms": self._denoise(client, loan),
        }

    def _generate(self, client: Client, loan: Loan, steps: int) -> tuple[torch.Tensor, dict[str, float], float]:
        started = time.perf_counter()
        result = client.generate(
            loan,
            self.inputs["prompt_embeds"],
            self.inputs["pooled_prompt_embeds"],
            noise=self.inputs["noise"],
            height=self.pixels,
            width=self.pixels,
            steps=steps,
        ).result()
        return result.latents, result.timings_ms, (time.perf_counter() - started) * 1e3

    def _denoise(self, client: Client, loan: Loan) -> dict[str, float]:
        """A forward as a client's own sampler asks for it: conditioning kept in the workers, or sent each time."""
        tensors = self.inputs["prompt_embeds"], self.inputs["pooled_prompt_embeds"]
        kept = client.condition(*tensors, guidance=3.5)

        def median_ms(step: Callable[[], object]) -> float:
            step()
            return statistics.median(timed_ms(step) for _ in range(8))

        kept_ms = median_ms(lambda: client.denoise(loan, self.inputs["noise"], 0.5, kept))
        self.report["denoise_in_workers_ms"] = dict(client.status().last_job_ms)
        return {
            "kept": kept_ms,
            "sent_along": median_ms(lambda: client.denoise(loan, self.inputs["noise"], 0.5, *tensors, guidance=3.5)),
        }

    def _swap(self, client: Client, loan: Loan, other: Loan) -> dict[str, float]:
        """What it costs to run the other checkpoint of the same architecture, and then the first one again."""
        plug = [self._generate(client, which, 2)[1]["plug"] for which in (other, loan, other, loan)]
        return {"plug_ms": statistics.median(plug)}

    def _parity(self, latents: torch.Tensor, rival: str) -> float:
        from safetensors.torch import load_file

        expected = load_file(self._latents[rival])["latents"]
        return float((latents.float() - expected).norm() / expected.norm())

    def _extra_memory(self) -> dict[str, float]:
        """GiB on the GPUs by process; the client's share without its own weights."""
        by_process = gpu_memory_by_process()
        mine = by_process.pop(os.getpid(), 0) - self._own_bytes
        return {"workers_gib": sum(by_process.values()) / GIB, "client_beyond_weights_gib": mine / GIB}


def connect(runtime: Path, daemon: subprocess.Popen[bytes]) -> Client:
    while daemon.poll() is None:
        try:
            return Client(runtime, name="benchmark")
        except DaemonUnreachable:
            time.sleep(0.005)
    sys.exit(f"the daemon ended with status {daemon.returncode}")


def lend_once(client: Client, arena: Arena) -> tuple[Loan, dict[str, Any]]:
    """Lend an arena. ``total_ms`` ends when ``lend`` returns: mapped, verified and plugged on all ranks."""
    started = time.perf_counter()
    loan = client.lend(arena.tensors)
    total_ms = (time.perf_counter() - started) * 1e3
    copied = {kind: getattr(loan.copied, kind) for kind in loan.copied.__struct_fields__}
    tiers = [tier.value for tier in loan.tiers]
    return loan, {"total_ms": total_ms, "phases_ms": dict(loan.timings_ms), "copied_bytes": copied, "tiers": tiers}


def timed_ms(action: Any) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(f"\n{', '.join(machine['gpus']) or machine['cpu']}; Python {machine['python']}")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    plain = report["rivals"]["diffusers1"]
    print(f"\nplain diffusers, one process: {plain['step_ms']:.1f} ms a step")
    for group in report["groups"]:
        jobs, memory = group["jobs"], group["memory"]
        rival = report["rivals"][f"xfuser{group['workers']}"]
        phases = group["lends"][len(group["lends"]) // 2]
        copied = sum(phases["copied_bytes"].values())
        rows = [
            ("lend, built skeleton, median", f"{group['lend_ms']:.1f} ms for {group['lent_gib']:.2f} GiB"),
            ("  by phase", ", ".join(f"{name} {ms:.1f}" for name, ms in phases["phases_ms"].items())),
            ("  tier, bytes copied", f"{', '.join(phases['tiers'])}, {copied / GIB:.2f} GiB"),
            ("first lend (builds the skeleton)", f"{group['first_lend']['total_ms']:.1f} ms"),
            ("lend of what is lent already", f"{group['relend_unchanged_ms']:.1f} ms"),
            ("swap to another checkpoint (plug)", f"{group['swap']['plug_ms']:.1f} ms"),
            (
                "step, generate",
                f"{jobs['step_ms']:.1f} ms = {jobs['step_ms'] / rival['step_ms']:.3f}x xfuser in-process",
            ),
            ("  against plain diffusers", f"{plain['step_ms'] / jobs['step_ms']:.2f}x as fast"),
            (
                "step, denoise from the client",
                ", ".join(
                    f"{how} {took_ms:.1f} ms = {took_ms / jobs['step_ms']:.3f}x"
                    for how, took_ms in jobs["denoise_ms"].items()
                ),
            ),
            ("whole job, seen by the client", f"{jobs['whole_ms'] / 1e3:.3f} s"),
            ("parity against", ", ".join(f"{name} {error:.2e}" for name, error in jobs["parity"].items())),
            ("same bits again", str(jobs["repeats_identically"])),
            ("GPU memory: workers, ready", f"{memory['workers_ready']['workers_gib']:.2f} GiB"),
            ("GPU memory: workers, lent", f"{memory['lent']['workers_gib']:.2f} GiB"),
            ("GPU memory: workers, after jobs", f"{memory['ran']['workers_gib']:.2f} GiB"),
            ("GPU memory: client beyond weights", f"{memory['ran']['client_beyond_weights_gib']:.2f} GiB"),
            ("daemon answers, workers ready", " s, ".join(f"{took:.2f}" for took in group["seconds"].values()) + " s"),
        ]
        print(f"\n{group['workers']} worker(s), {group['parallel']}, attention {group['attention']}")
        for label, value in rows:
            print(f"  {label:36s} {value}")


def main() -> int:
    given = build_parser().parse_args()
    gpus = torch.cuda.device_count() if given.device == "cuda" else 2
    groups = given.workers or sorted({1, gpus})
    with tempfile.TemporaryDirectory(prefix="xditd-bench-") as folder:
        run = Run(given, Path(folder))
        run.rival("diffusers", 1)
        for workers in groups:
            run.rival("xfuser", workers)
        for workers in groups:
            try:
                run.group(workers)
            except BaseException:
                say((run.folder / f"daemon{workers}.log").read_text()[-4000:])
                raise
        print_table(run.report)
        run.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
