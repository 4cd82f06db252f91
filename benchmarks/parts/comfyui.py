"""Run FLUX.1 in a real ComfyUI with default flags: through each of xDiT's nodes, and stock on one GPU.

    COMFYUI_PATH=~/ComfyUI python benchmarks/run.py comfyui                   # FLUX.1-dev size, on the GPUs here
    COMFYUI_PATH=~/ComfyUI python benchmarks/run.py comfyui --device cpu --small

Weights are random, in a file; conditioning is random, 512 tokens. Times start just before a prompt is queued, and end
when the image's pixels are computed. ``--json`` is written after every path, so an interrupted run leaves what it has.

Needs: a checkout of ComfyUI (--comfyui, COMFYUI_PATH) and GPUs; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfyui_server import ComfyServer, Failure, make_base
from machine import describe_machine, gpu_memory_by_process, gpu_memory_used, temporary_folder
from measuring import GIB, Report, add_device, clean_environment, need_gpus, part_command, print_table, say, skip

from xditd.client import Client
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.errors import XditdError

PATHS = {
    "loader": "XDiT UNet Loader, KSampler",
    "accelerate": "stock loader, XDiT Accelerate, KSampler",
    "fused": "XDiT UNet Loader, XDiT KSampler",
    "stock": "stock loader, KSampler, one GPU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--workers", type=int, nargs="*", help="group sizes (default: 1 and the number of GPUs)")
    parser.add_argument("--paths", nargs="*", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a checkout of ComfyUI")
    parser.add_argument("--scratch", type=Path, help="where the files go (default: /dev/shm if they fit, else TMPDIR)")
    parser.add_argument("--deadline", type=float, default=340.0, help="seconds after which no new path is begun")
    parser.add_argument("--logs", type=Path, help="keep the logs of ComfyUI and the daemon in this folder")


class Run:
    """One run of the benchmark: its files, sizes and results."""

    def __init__(self, given: argparse.Namespace, report: Report, folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.logs = given.logs or folder
        self.logs.mkdir(parents=True, exist_ok=True)
        self.base = folder / "comfyui"
        self.pixels = 128 if given.small else 1024
        self.tokens = 16 if given.small else 512
        self.steps = (6, 2) if given.small else (28, 8)
        self.ends = time.monotonic() + given.deadline
        self.report = report
        report.add(pixels=self.pixels, tokens=self.tokens, steps=self.steps, groups=[], faults=[])
        make_base(self.base)

    def write_files(self) -> None:
        """Write the checkpoints in another process, so that its GPU memory is free afterwards."""
        small = ["--small"] if self.given.small else []
        command = part_command("files", self.base / "models", "--comfyui", "--device", self.given.device, *small)
        subprocess.run(command, env=clean_environment(), stdout=2, check=True)

    def group(self, workers: int, paths: list[str]) -> None:
        """Start a daemon and a ComfyUI, and measure the paths."""
        say(f"daemon with {workers} worker(s), and ComfyUI")
        found: dict[str, Any] = {"workers": workers, "paths": {}}
        self.report.found["groups"].append(found)
        flags = ["--cpu"] if self.given.device == "cpu" else []
        daemon = DaemonProcess(self.logs / f"daemon{workers}.log", workers, self.given.device)
        started = time.perf_counter()
        log = self.logs / f"comfyui{workers}.log"
        server = ComfyServer(self.given.comfyui, self.base, daemon.runtime_dir, log, flags)
        try:
            server.wait_up()
            found["comfyui_up_s"] = time.perf_counter() - started
            with daemon.connect() as client:
                found["parallel"] = dict(daemon.wait_ready(client, lambda _: None).parallel)
                found["idle"] = self._memory()
                recorded = server.ask("/xditd_bench")
                found["comfyui"] = {
                    key: value for key, value in recorded.items() if key not in ("steps", "marks", "forwards")
                }
                say(f"ComfyUI: {found['comfyui']}")
                for name in paths:
                    self._try_path(found, server, client, name)
        finally:
            server.stop()
            daemon.stop(None)

    def fault(self, text: str) -> None:
        say(text)
        self.report.add(faults=[*self.report.found["faults"], text])

    def _try_path(self, group: dict[str, Any], server: ComfyServer, client: Client, name: str) -> None:
        what = f"{name}, {group['workers']} worker(s)"
        if time.monotonic() > self.ends:
            self.fault(f"{what}: not started, --deadline {self.given.deadline:.0f} s is over")
            return
        say(what)
        try:
            self._path(group, server, client, name)
        except (Failure, XditdError, OSError, KeyError) as error:
            self.fault(f"{what}: {type(error).__name__}: {error}")
        self.report.add()

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
        if name == "fused":
            found["generate_step_ms"] = self._generate_step_ms(server, client)
        if name in ("loader", "accelerate"):
            found["lora"] = self._lora(server, client, name, label)
        found["memory"]["unloaded"] = self._memory_after_unload(server, client)

    def _generate_step_ms(self, server: ComfyServer, client: Client) -> float:
        """Return the workers' time of a step of ``generate``, from one loop with many steps and one with few."""
        took = []
        for seed, steps in ((5, self.steps[0]), (6, self.steps[1])):
            server.run(self._prompt("fused", seed, steps, "generate"))
            took.append(client.status().last_job_ms["steps"])
        return (took[0] - took[1]) / (self.steps[0] - self.steps[1])

    def _lora(self, server: ComfyServer, client: Client, name: str, label: str) -> dict[str, Any]:
        """Time a LoRA on all linear layers: first, at the same strength, and at other strengths."""
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
            server.unload()  # repeated, because ComfyUI ignores it while a prompt is ending
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
        """Report the relative difference of each path's latents from stock ComfyUI, for one seed."""
        import torch
        from safetensors.torch import load_file

        kept = {path.stem: load_file(path)["latents"] for path in (self.base / "output").glob("*.safetensors")}
        plain = next((value for name, value in sorted(kept.items()) if name.rstrip("0123456789") == "stock"), None)
        if plain is None:
            return
        errors = {
            name: float(torch.linalg.vector_norm(value - plain) / torch.linalg.vector_norm(plain))
            for name, value in kept.items()
            if value.shape == plain.shape and name.rstrip("0123456789") in PATHS
        }
        self.report.add(against_stock=errors)


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


def run(given: argparse.Namespace, report: Report) -> int:
    if given.comfyui is None or not (given.comfyui / "main.py").is_file():
        skip("comfyui: --comfyui and COMFYUI_PATH name no checkout of ComfyUI")
    gpus = len(describe_machine()["gpus"]) if given.device == "cuda" else 2
    sizes = given.workers or sorted({1, gpus})
    need_gpus("comfyui", max(sizes), given.device)
    scratch = given.scratch or temporary_folder((1 if given.small else 26) * GIB)
    with tempfile.TemporaryDirectory(prefix="xditd-comfy-", dir=scratch) as folder:
        measured = Run(given, report, Path(folder))
        measured.write_files()
        for at, workers in enumerate(sizes):
            try:
                measured.group(workers, [name for name in given.paths if at == 0 or name != "stock"])
            except (Failure, XditdError, OSError) as error:
                measured.fault(f"{workers} worker(s): {error}")
        measured.compare()
    print_tables(report.found)
    for fault in report.found["faults"]:
        say(fault)
    return 1 if report.found["faults"] else 0


def print_tables(report: Mapping[str, Any]) -> None:
    print(f"{report['pixels']} pixels, {report['tokens']} tokens, {report['steps'][0]} steps")
    for group in report["groups"]:
        about = ", ".join(f"{key} {value}" for key, value in group.get("comfyui", {}).items())
        for name, found in group["paths"].items():
            rows = rows_of(found, group)
            if rows:
                print_table(f"{group['workers']} worker(s), {PATHS[name]}; ComfyUI: {about}", rows)
    errors = [(name, f"{error:.2e}") for name, error in sorted(report.get("against_stock", {}).items())]
    if errors:
        print_table("Latents of one seed, relative difference from stock ComfyUI", errors)


def rows_of(found: Mapping[str, Any], group: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for what in ("first", "second"):
        if what in found:
            run = found[what]
            rows.append((f"{what}: queue to latents, to image", f"{run['latents_s']:.2f} s, {run['image_s']:.2f} s"))
    for each in found.get("lent", []):
        copied = ", ".join(f"{kind} {gib:.2f} GiB" for kind, gib in each["copied_gib"].items() if gib) or "nothing"
        rows.append(
            (f"lent: {each['label']}", f"{'+'.join(each['tiers'])}, {each['lent_gib']:.2f} GiB; copied {copied}")
        )
    idle, memory = group["idle"]["by_gpu_gib"], found.get("memory", {})
    for what in ("ran", "unloaded") if idle else ():
        if what in memory:
            more = [after - before for after, before in zip(memory[what]["by_gpu_gib"], idle, strict=True)]
            rows.append((f"GPU memory beyond idle, {what}", ", ".join(f"{gib:+.2f} GiB" for gib in more)))
    if "step_ms" in found:
        rows.append(("a step (more steps less fewer)", f"{found['step_ms']:.1f} ms"))
        rows.append(("a step (median between two progress reports)", f"{found['gap_ms']:.1f} ms"))
    for what, title in (("forward_ms", "the remote forward"), ("call_ms", "  of which the client's call")):
        if what in found:
            rows.append((title, f"{found[what]:.1f} ms"))
    generate = group["paths"].get("fused", {}).get("generate_step_ms")
    if generate and "step_ms" in found:
        ratios = ", ".join(f"{found[what] / generate:.3f}x" for what in ("step_ms", "gap_ms"))
        rows.append(("a step of generate in the workers", f"{generate:.1f} ms: {ratios}"))
    if found.get("worker_ms"):
        rows.append(("last job in the workers, ms", ", ".join(f"{k} {v:.1f}" for k, v in found["worker_ms"].items())))
    lora = found.get("lora")
    if lora:
        rows.append(("LoRA: first time, to latents", f"{lora['first']['latents_s']:.2f} s"))
        rows.append(("LoRA: another strength costs", ", ".join(f"{each:.2f} s" for each in lora["change_s"])))
    return rows
