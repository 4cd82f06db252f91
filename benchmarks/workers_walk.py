"""Stages of the part workers: each measures one worker group and adds to the report."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux
import torch
from machine import gpu_memory_by_process
from measuring import GIB, AnonymousPeak, Report, drop_from_page_cache, part_command, repeat_ms, say, synchronize
from parts import files
from safetensors.torch import load_file

from xditd.client import Client, Loan
from xditd.client.arenas import Arena
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.client.demo.flux1_calls import Flux1Calls, Prompt
from xditd.ipc.errors import XditdError

RIVALS = ("diffusers_1", "xfuser_1", "xfuser_2")
FILE_SECONDS = 20.0
COLD_CLIENT_DEADLINE_S = 90.0
COLD_CLIENT_STEPS = 4


class StageFailed(Exception):
    """A stage cannot be measured here; the message says why."""


class Walk:
    """Runs stages in order with one daemon and one client."""

    def __init__(self, given: argparse.Namespace, report: Report, daemon: DaemonProcess) -> None:
        self.given = given
        self.report = report
        self.daemon = daemon
        self.scale = flux.scale_of(given)
        self.device = str(flux.device_of(given))
        self.inputs = load_file(given.files / files.INPUTS)
        self.arenas: list[Arena] = []
        self.client: Client
        self.loan: Loan
        self.vae: Loan
        self.other: Loan
        self.failed: dict[str, str] = {}

    def run(self, stages: tuple[Callable[[Walk], None], ...]) -> None:
        for stage in stages:
            say(f"  {stage.__name__}")
            try:
                stage(self)
            except (XditdError, StageFailed, OSError, subprocess.SubprocessError) as error:
                self.failed[stage.__name__] = f"{type(error).__name__}: {error}"
                say(f"  {stage.__name__} failed: {error}")
                self.report.add(failed_stages=self.failed)
                if stage is Walk.start:
                    return

    def close(self) -> None:
        """End all loans and free the memory."""
        client: Client | None = getattr(self, "client", None)
        if client is not None:
            client.close()
        for arena in self.arenas:
            arena.close()

    # --- Stages ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Time the start of the daemon to a first image, by phase."""
        seconds: dict[str, float] = {}
        self.client = self.daemon.connect()
        seconds["daemon_answers"] = time.perf_counter() - self.given.began
        # Filled while the workers start, because clients already have their weights.
        shapes = flux.shapes(self.scale.size, flux.dtype_on(self.given.device))
        for seed in (0, 1):
            self.arenas.append(Arena(shapes, self.device))
            flux.fill(self.arenas[-1].tensors, seed)
        self.arenas.append(Arena.copy_of(load_file(self.given.files / files.VAE), self.device))
        status = self.daemon.wait_ready(self.client, lambda _: None)
        seconds["workers_ready"] = time.perf_counter() - self.given.began
        self.report.add(
            workers=self.given.workers,
            flags=self.given.flags,
            parallel=dict(status.parallel),
            attention=status.attention_backend,
            memory={"workers_ready": self._extra_memory()},
        )
        self.loan, first = lend_once(self.client, self.arenas[0])
        self.vae, first_vae = lend_once(self.client, self.arenas[2])
        self.report.found["memory"]["lent"] = self._extra_memory()
        image_ms, timings = self._generate(self.scale.steps, with_vae=self.given.walk == "whole")
        self.report.add(
            start_s=seconds,
            first_lend=first,
            first_vae_lend=first_vae,
            first_image_ms=image_ms,
            first_image_workers_ms=timings,
        )

    def lends(self) -> None:
        """Time lends for a model that is built, and lends of what is already lent."""
        relent: list[Loan] = []
        again = repeat_ms(lambda: relent.append(self.client.lend(self.arenas[0].tensors)), self.given.repeats)
        for loan in relent:
            loan.return_()
        found = []
        for number in range(self.given.lends):
            self.other, measured = lend_once(self.client, self.arenas[1])
            found.append(measured)
            if number < self.given.lends - 1:
                self.other.return_()
        self.report.add(relend_ms=again, lends=found)

    def jobs(self) -> None:
        """Time whole jobs, to latents and to an image."""
        runs = [self._generate(self.scale.steps) for _ in range(self.given.repeats)]
        self.report.add(
            latents={"client_ms": [whole for whole, _ in runs], "workers_ms": [timings for _, timings in runs]}
        )
        if self.given.walk == "whole":
            runs = [self._generate(self.scale.steps, with_vae=True) for _ in range(self.given.repeats)]
            self.report.add(
                image={"client_ms": [whole for whole, _ in runs], "workers_ms": [timings for _, timings in runs]}
            )
        self.report.found["memory"]["ran"] = self._extra_memory()

    def parity(self) -> None:
        """Compare latents after a few steps with those that the part rival wrote, and with a second run."""
        latents, again = (self._latents(self.scale.parity_steps) for _ in range(2))
        errors = {}
        for rival in RIVALS:
            path = self.given.files / f"latents_{rival}.safetensors"
            if path.exists():
                expected = load_file(path)["latents"]
                errors[rival] = float((latents.float() - expected).norm() / expected.norm())
        self.report.add(parity=errors, same_bits_again=bool(torch.equal(latents, again)))

    def calls(self) -> None:
        """Time one forward as a client's own sampler calls it, also with two rows, as with a negative prompt.

        The sampler keeps and packs its latents on the lending GPU.
        """
        calls, noise = Flux1Calls(self.client, self.loan), self.inputs["noise"].to(self.device)
        sent = Prompt(self.inputs["prompt_embeds"], self.inputs["pooled_prompt_embeds"])
        kept = calls.keep(self.inputs["prompt_embeds"], self.inputs["pooled_prompt_embeds"])
        two = torch.cat([noise, noise.flip(-1)])
        repeats = self.given.repeats + 3
        sigmas = [1.0 - number / self.scale.steps for number in range(self.scale.steps)]

        def step_ms(step: Callable[[float], object]) -> list[float]:
            """Step through the schedule as samplers do, without the first steps, which prepare the others."""
            coming = itertools.cycle(sigmas)
            for _ in range(3):
                step(next(coming))
            return repeat_ms(lambda: step(next(coming)), repeats)

        found: dict[str, Any] = {"kept_ms": step_ms(lambda sigma: calls.predict(noise, sigma, kept, sigmas=sigmas))}
        found["workers_ms"] = dict(self.client.status().last_job_ms)
        found["unforeseen_ms"] = step_ms(lambda sigma: calls.predict(noise, sigma, kept))
        found["sent_ms"] = step_ms(lambda sigma: calls.predict(noise, sigma, sent))
        found["two_rows_ms"] = step_ms(lambda sigma: calls.predict(two, sigma, [kept, kept], sigmas=sigmas))
        self.report.add(denoise=found)

    def swap(self) -> None:
        """Time the first step after a change to another fine-tune, and the next one; both are jobs of one step."""
        built = self.client.status().counters.models_built
        first, steady, plug = [], [], []
        for number in range(2 * self.given.repeats):
            which = (self.other, self.loan)[number % 2]
            _, timings = self._generate(1, loan=which)
            first.append(timings["plug"] + timings["steps"])
            plug.append(timings["plug"])
            _, timings = self._generate(1, loan=which)
            steady.append(timings["plug"] + timings["steps"])
        counters = self.client.status().counters
        self.report.add(
            swap={
                "first_workers_ms": first,
                "steady_workers_ms": steady,
                "plug_workers_ms": plug,
                "models_built": counters.models_built - built,
            }
        )

    def files(self) -> None:
        """Time lends of a file: from the page cache, from the disk, and through an arena of the client."""
        self._free_other()
        path = self.given.files / files.CHECKPOINT
        pids = [worker.pid for worker in self.client.status().workers]
        found: dict[str, Any] = {"warm": [], "anonymous_gib": []}

        def lend_file(device: str | None = None) -> dict[str, Any]:
            with AnonymousPeak(pids) as peak:
                loan, measured = lend_once(self.client, path, device=device)
            measured["anonymous_gib"] = peak.grown_gib()
            loan.return_()
            return measured

        started = time.perf_counter()
        while len(found["warm"]) < self.given.repeats and time.perf_counter() - started < FILE_SECONDS:
            found["warm"].append(lend_file())
            self.report.add(files=found)
        if self.given.device == "cuda":
            found["through_arena"] = [lend_file(self.device)]
        reason = drop_from_page_cache(path)
        found |= {"cold_refused": reason} if reason else {"cold": lend_file()}
        self.report.add(files=found)

    def cold_clients(self) -> None:
        """Time ``lend`` to a first image for clients in new processes."""
        self._free_other()
        out = self.daemon.log.with_suffix(".client.json")
        common = [
            "--files",
            self.given.files,
            "--device",
            self.given.device,
            *(["--small"] if self.given.small else []),
        ]
        found: list[dict[str, Any]] = []
        for number in range(self.given.cold_clients):
            command = part_command("workers", "--cold-client", self.daemon.runtime_dir, "--seed", 10 + number, *common)
            subprocess.run(
                [*command, "--json", str(out)], stdout=subprocess.DEVNULL, timeout=COLD_CLIENT_DEADLINE_S, check=True
            )
            found.append({key: value for key, value in json.loads(out.read_text()).items() if key != "machine"})
            self.report.add(cold_clients=found)

    # --- Helpers ---------------------------------------------------------------------------------

    def _generate(
        self, steps: int, *, with_vae: bool = False, loan: Loan | None = None
    ) -> tuple[float, dict[str, float]]:
        """Run a job; returns the client's milliseconds, and the workers' by phase."""
        started = time.perf_counter()
        result = self._start_job(steps, self.vae if with_vae else None, loan or self.loan).result()
        return (time.perf_counter() - started) * 1e3, result.timings_ms

    def _latents(self, steps: int) -> torch.Tensor:
        return self._start_job(steps, None, self.loan).result().latents

    def _start_job(self, steps: int, vae: Loan | None, loan: Loan) -> Any:
        more = {"step_cache": self.given.step_cache} if self.given.step_cache else {}
        return self.client.generate(
            loan,
            {name: self.inputs[name] for name in ("prompt_embeds", "pooled_prompt_embeds")},
            vae=vae,
            noise=self.inputs["noise"],
            height=self.scale.pixels,
            width=self.scale.pixels,
            steps=steps,
            **more,
        )

    def _free_other(self) -> None:
        """Return the second checkpoint's loan and free its memory on all GPUs."""
        if hasattr(self, "other"):
            self.other.return_()
            del self.other
            self.arenas.pop(1).close()

    def _extra_memory(self) -> dict[str, float]:
        """Return GiB on the GPUs of the workers and of the client, the client's without its weights."""
        by_process = gpu_memory_by_process()
        mine = by_process.pop(os.getpid(), 0) - sum(arena.size_bytes for arena in self.arenas)
        lent = [arena for arena, name in zip(self.arenas, ("loan", "other", "vae"), strict=True) if hasattr(self, name)]
        return {
            "workers_gib": sum(by_process.values()) / GIB,
            "lent_gib": sum(arena.size_bytes for arena in lent) / GIB,
            "client_beyond_weights_gib": mine / GIB,
        }


def run_cold_client(given: argparse.Namespace, report: Report) -> None:
    """Time ``lend`` to a first image for a client that has just started and a warm daemon.

    The client's weights are made in arenas, where ComfyUI would have loaded them, before the clock starts.
    """
    scale, device = flux.scale_of(given), flux.device_of(given)
    transformer = Arena(flux.shapes(scale.size, flux.dtype_on(given.device)), device)
    flux.fill(transformer.tensors, given.seed)
    vae = Arena.copy_of(load_file(given.files / files.VAE), device)
    inputs = load_file(given.files / files.INPUTS)
    synchronize(device)

    marks = [time.perf_counter()]
    with Client(given.cold_client, name="cold client") as client:
        marks.append(time.perf_counter())
        lent = client.lend(transformer.tensors)
        marks.append(time.perf_counter())
        lent_vae = client.lend(vae.tensors)
        marks.append(time.perf_counter())
        result = client.generate(
            lent,
            {name: inputs[name] for name in ("prompt_embeds", "pooled_prompt_embeds")},
            vae=lent_vae,
            noise=inputs["noise"],
            height=scale.pixels,
            width=scale.pixels,
            steps=COLD_CLIENT_STEPS,
        ).result()
        marks.append(time.perf_counter())
        phases = dict(lent.timings_ms)
    took_ms = [(after - before) * 1e3 for before, after in itertools.pairwise(marks)]
    found = dict(zip(("connect_ms", "lend_ms", "lend_vae_ms", "image_ms"), took_ms, strict=True))
    report.add(**found, steps=COLD_CLIENT_STEPS, timings_ms=result.timings_ms, lend_phases_ms=phases)


WALKS = {
    "whole": (
        Walk.start,
        Walk.lends,
        Walk.jobs,
        Walk.parity,
        Walk.calls,
        Walk.swap,
        Walk.cold_clients,
        Walk.files,
    ),
    "jobs": (Walk.start, Walk.parity, Walk.jobs, Walk.calls),
}


def lend_once(client: Client, source: Arena | Path, device: str | None = None) -> tuple[Loan, dict[str, Any]]:
    """Lend once; ``total_ms`` is the time until ``lend`` returns: mapped, verified and plugged on all ranks."""
    started = time.perf_counter()
    loan = client.lend(source.tensors if isinstance(source, Arena) else source, device=device)
    total_ms = (time.perf_counter() - started) * 1e3
    copied = {kind: getattr(loan.copied, kind) for kind in loan.copied.__struct_fields__}
    tiers = [tier.value for tier in loan.tiers]
    return loan, {"total_ms": total_ms, "phases_ms": dict(loan.timings_ms), "copied_bytes": copied, "tiers": tiers}
