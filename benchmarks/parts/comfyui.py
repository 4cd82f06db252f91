"""FLUX.1 in a real ComfyUI on default flags: through each node of xDiT, and stock on one GPU, in one run.

    COMFYUI_PATH=~/ComfyUI python benchmarks/comfyui_path.py                  # FLUX.1-dev size, on the GPUs here
    COMFYUI_PATH=~/ComfyUI python benchmarks/comfyui_path.py --device cpu --small

Weights are random and in a file, as users have them; conditioning is random, 512 tokens. Every figure is counted from
the moment before a prompt is queued, and a picture counts as there when its pixels are. Prints a table; ``--json FILE``
writes all of it after every part, so that a run that is cut short leaves what it had.
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

from comfyui_server import ComfyServer, Failure, clean_environment, make_base
from comfyui_table import print_table
from machine import describe_machine, gpu_memory_by_process, gpu_memory_used, roomy_folder

from xditd.client import Client
from xditd.client.output_files import write_file
from xditd.ipc.errors import DaemonUnreachable, XditdError
from xditd.ipc.status import GroupState

HERE = Path(__file__).resolve().parent
GIB = 2**30
PATHS = {
    "loader": "XDiT UNet Loader, KSampler",
    "accelerate": "stock loader, XDiT Accelerate, KSampler",
    "fused": "XDiT UNet Loader, XDiT KSampler",
    "stock": "stock loader, KSampler, one GPU",
}
READY_DEADLINE_S = 150.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny transformer, small images: a dry run")
    parser.add_argument("--workers", type=int, nargs="*", help="group sizes (default: 1 and the number of GPUs)")
    parser.add_argument("--paths", nargs="*", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a checkout of ComfyUI")
    parser.add_argument("--scratch", type=Path, help="where the files go (default: /dev/shm if they fit, else TMPDIR)")
    parser.add_argument("--deadline", type=float, default=340.0, help="seconds after which no new part is begun")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--logs", type=Path, help="keep the logs of ComfyUI and the daemon in this folder")
    return parser


class Run:
    """One run of the benchmark: its files, its sizes, and what was measured."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.logs = given.logs or folder
        self.logs.mkdir(parents=True, exist_ok=True)
        self.base = folder / "comfyui"
        self.pixels = 128 if given.small else 1024
        self.tokens = 16 if given.small else 512
        self.steps = (6, 2) if given.small else (28, 8)
        self.ends = time.monotonic() + given.deadline
        self.report: dict[str, Any] = {"machine": describe_machine(), "pixels": self.pixels, "tokens": self.tokens}
        self.report |= {"steps": self.steps, "groups": [], "faults": []}
        make_base(self.base)

    def write_files(self) -> subprocess.Popen[bytes]:
        """Have another process write the checkpoints, so that its memory on the GPU is gone when it ends."""
        command = [sys.executable, str(HERE / "comfyui_files.py"), str(self.base / "models"), self.given.device]
        command += ["--small"] if self.given.small else []
        return subprocess.Popen(command, env=clean_environment())

    def group(self, workers: int, paths: list[str], files: subprocess.Popen[bytes] | None) -> None:
        """Start a daemon and a ComfyUI, and take the paths through them."""
        say(f"daemon with {workers} worker(s), and ComfyUI")
        runtime = self.folder / f"run{workers}"
        command = [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(runtime)]
        command += ["--workers", str(workers), "--device", self.given.device]
        with (self.logs / f"daemon{workers}.log").open("w") as log:
            daemon = subprocess.Popen(command, env=clean_environment(), stderr=log)
        flags = ["--cpu"] if self.given.device == "cpu" else []
        if files is not None and files.wait() != 0:
            raise Failure("the checkpoints were not written")
        started = time.perf_counter()
        server = ComfyServer(self.given.comfyui, self.base, runtime, self.logs / f"comfyui{workers}.log", flags)
        found: dict[str, Any] = {"workers": workers, "paths": {}}
        self.report["groups"].append(found)
        try:
            server.wait_up()
            found["comfyui_up_s"] = time.perf_counter() - started
            with connect(runtime, daemon) as client:
                found["parallel"] = wait_ready(client)
                found["idle"] = self._memory()
                found["comfyui"] = {
                    key: value
                    for key, value in server.ask("/xditd_bench").items()
                    if key not in ("steps", "marks", "forwards", "profile")
                }
                say(f"ComfyUI: {found['comfyui']}")
                for name in paths:
                    self._part(
                        f"{name}, {workers} worker(s)", lambda name=name: self._path(found, server, client, name)
                    )
        finally:
            server.stop()
            daemon.terminate()
            daemon.wait(timeout=60)

    def _part(self, what: str, run: Callable[[], None]) -> None:
        if time.monotonic() > self.ends:
            self.report["faults"].append(f"{what}: not begun, {self.given.deadline:.0f} s were over")
            return
        say(what)
        try:
            run()
        except (Failure, XditdError, OSError, KeyError) as error:
            say(f"{what} failed: {error}")
            self.report["faults"].append(f"{what}: {type(error).__name__}: {error}")
        self.write()

    def _path(self, group: dict[str, Any], server: ComfyServer, client: Client, name: str) -> None:
        many, few = self.steps
        label = f"{name}{group['workers']}"
        found: dict[str, Any] = {}
        group["paths"][name] = found
        before = self._memory()
        found["first"] = server.run(self._prompt(name, 1, many, label))
        found["memory"] = {"before": before, "ran": self._memory()}
        found["lent"] = lent(client)
        found["second"] = server.run(self._prompt(name, 2, many, f"{label}_second"))
        found["worker_ms"] = dict(client.status().last_job_ms) if name != "stock" else {}
        found["again"] = [server.run(self._prompt(name, seed, few, f"{label}_few")) for seed in (3, 4)]
        longer = [found["second"]["latents_s"] - each["latents_s"] for each in found["again"]]
        found["step_ms"] = statistics.median(longer) / (many - few) * 1e3
        for what, times in found["second"]["forwards"].items():
            if times:
                found[what] = statistics.median(times)
        found["gap_ms"] = statistics.median(found["second"]["gaps_ms"])
        if name == "loader":
            server.ask("/xditd_bench?profile=1")
            found["profile"] = server.run(self._prompt(name, 7, many, f"{label}_profile"))["profile"].splitlines()
        if name == "fused":
            found["generate_step_ms"] = self._generate_step_ms(server, client)
        if name in ("loader", "accelerate"):
            found["lora"] = self._lora(server, client, name, label)
        found["memory"]["unloaded"] = self._memory_after_unload(server, client)

    def _generate_step_ms(self, server: ComfyServer, client: Client) -> float:
        """What the workers say that a step of ``generate`` takes: of the whole loop with many steps and with few."""
        took = []
        for seed, steps in ((5, self.steps[0]), (6, self.steps[1])):
            server.run(self._prompt("fused", seed, steps, "generate"))
            took.append(client.status().last_job_ms["steps"])
        return (took[0] - took[1]) / (self.steps[0] - self.steps[1])

    def _lora(self, server: ComfyServer, client: Client, name: str, label: str) -> dict[str, Any]:
        """Seconds for a LoRA on all linear layers: first, at another strength, and at the same one."""
        few = self.steps[1]
        found: dict[str, Any] = {}
        for what, seed, strength in (("first", 11, 0.6), ("same", 12, 0.6), ("changed", 13, 0.8), ("again", 14, 0.5)):
            found[what] = server.run(self._prompt(name, seed, few, f"{label}_lora_{what}", lora=strength))
        found["lent"] = lent(client)
        found["memory"] = self._memory()
        same = found["same"]["latents_s"]
        found["change_s"] = [found[what]["latents_s"] - same for what in ("changed", "again")]
        return found

    def _memory_after_unload(self, server: ComfyServer, client: Client) -> dict[str, Any]:
        ends = time.monotonic() + 20.0
        while True:
            server.unload()  # again and again: ComfyUI overlooks it where a prompt is just ending
            time.sleep(0.5)
            components = len(client.status().components)
            if not components or time.monotonic() > ends:
                return {**self._memory(), "components": components}

    def _memory(self) -> dict[str, Any]:
        return {
            "by_gpu_gib": [used / GIB for used in gpu_memory_used()],
            "by_process_gib": {str(pid): used / GIB for pid, used in gpu_memory_by_process().items()},
        }

    def _prompt(self, name: str, seed: int, steps: int, keep: str, *, lora: float | None = None) -> dict[str, Any]:
        nodes: dict[str, Any] = {}

        def add(number: str, kind: str, **inputs: Any) -> list[Any]:
            nodes[number] = {"class_type": kind, "inputs": inputs}
            return [number, 0]

        if name in ("loader", "fused"):
            model = add("1", "XDiTUNetLoader", unet_name="flux.safetensors", weight_dtype="default", ulysses_degree=0)
        else:
            model = add("2", "UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
        if lora is not None:
            model = add("3", "LoraLoaderModelOnly", model=model, lora_name="lora.safetensors", strength_model=lora)
        if name == "accelerate":
            model = add("4", "XDiTAccelerate", model=model)
        vae = add(*(("5", "XDiTVAELoader") if name == "fused" else ("6", "VAELoader")), vae_name="ae.safetensors")
        sampling = {
            "model": model, "seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": add("7", "BenchConditioning", seed=1, tokens=self.tokens, guidance=3.5),
            "negative": add("8", "BenchConditioning", seed=2, tokens=self.tokens, guidance=3.5),
            "latent_image": add("9", "EmptyLatentImage", width=self.pixels, height=self.pixels, batch_size=1),
            "denoise": 1.0,
        }  # fmt: skip
        if name == "fused":
            sampled = add("10", "XDiTKSampler", vae=vae, **sampling)
            add("12", "BenchSink", latent=add("11", "BenchLatents", latent=sampled, name=keep))
            picture = [sampled[0], 1]
        else:
            latents = add("11", "BenchLatents", latent=add("10", "KSampler", **sampling), name=keep)
            picture = add("12", "VAEDecode", samples=latents, vae=vae)
        add("13", "BenchImage", image=picture)
        return nodes

    def compare(self) -> None:
        """Relative differences of latents of one seed, each path against stock ComfyUI."""
        import torch
        from safetensors.torch import load_file

        kept = {path.stem: load_file(path)["latents"] for path in (self.base / "output").glob("*.safetensors")}
        plain = next((value for name, value in sorted(kept.items()) if name.rstrip("0123456789") == "stock"), None)
        if plain is None:
            return
        self.report["against_stock"] = {
            name: float(torch.linalg.vector_norm(value - plain) / torch.linalg.vector_norm(plain))
            for name, value in kept.items()
            if value.shape == plain.shape and name.rstrip("0123456789") in PATHS
        }

    def write(self) -> None:
        if self.given.json is not None:
            write_file(self.given.json, json.dumps(self.report, indent=2).encode(), b"\n")


def lent(client: Client) -> list[dict[str, Any]]:
    return [
        {
            "label": each.label,
            "tiers": [tier.value for tier in each.tiers],
            "lent_gib": each.lent_bytes / GIB,
            "copied_gib": {kind: getattr(each.copied, kind) / GIB for kind in each.copied.__struct_fields__},
            "lend_ms": dict(each.lend_ms),
            "generation": each.generation,
        }
        for each in client.status().components
    ]


def connect(runtime: Path, daemon: subprocess.Popen[bytes]) -> Client:
    while daemon.poll() is None:
        try:
            return Client(runtime, name="benchmark")
        except DaemonUnreachable:
            time.sleep(0.02)
    raise Failure(f"the daemon ended with status {daemon.returncode}")


def wait_ready(client: Client) -> dict[str, int]:
    ends = time.monotonic() + READY_DEADLINE_S
    while (status := client.status()).group_state is not GroupState.READY:
        if time.monotonic() > ends:
            raise Failure(f"the workers are not ready: {status.group_state.value} {status.group_detail}")
        time.sleep(0.1)
    return dict(status.parallel)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    given = build_parser().parse_args()
    if given.comfyui is None or not (Path(given.comfyui) / "main.py").is_file():
        sys.exit("COMFYUI_PATH names no ComfyUI checkout")
    gpus = len(describe_machine()["gpus"]) if given.device == "cuda" else 2
    if not gpus:
        sys.exit("no GPU here; --device cpu --small makes a dry run")
    sizes = given.workers or sorted({1, gpus})
    scratch = given.scratch or roomy_folder((1 if given.small else 26) * GIB)
    with tempfile.TemporaryDirectory(prefix="xditd-comfy-", dir=scratch) as folder:
        run = Run(given, Path(folder))
        files: subprocess.Popen[bytes] | None = run.write_files()
        for at, workers in enumerate(sizes):
            paths = [name for name in given.paths if at == 0 or name != "stock"]
            try:
                run.group(workers, paths, files)
            except (Failure, XditdError, OSError, subprocess.SubprocessError) as error:
                run.report["faults"].append(f"{workers} worker(s): {error}")
                say(run.report["faults"][-1])
            files = None
            run.write()
        run.compare()
        run.write()
        print_table(run.report, PATHS)
    if run.report["faults"]:
        sys.exit("\n".join(["", *run.report["faults"]]))


if __name__ == "__main__":
    main()
