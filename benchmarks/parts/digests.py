"""Digest the results of every kind of job on the CPU, to compare two versions bit by bit.

    python benchmarks/run.py digests --json before.json             # with one version
    python benchmarks/run.py digests --against before.json          # with the other, on the same machine

Starts the real daemon with one rank and with two, lends small seeded checkpoints, and runs jobs of each kind: sizes and
texts that the ranks divide and others, batches, given sigmas, previews, a step cache, kept conditioning of several
texts, VAE decode and encode, text encoders. Bits depend on the processor and on torch: compare on one machine only.
Exit status 1 if any digest differs.

Needs: nothing else
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import Report, add_ranks

sys.path.append(str(Path(__file__).parents[2] / "tests/checkpoints"))

import text_checkpoints

from xditd.client import Client, Loan
from xditd.client.demo import checkpoints
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.client.demo.flux1_calls import Flux1Calls

Results = Iterator[tuple[str, torch.Tensor]]
SIGMAS = (1.0, 0.7, 0.35, 0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ranks(parser)
    parser.set_defaults(ranks=[1, 2])
    parser.add_argument("--against", type=Path, help="compare with this file that --json wrote")


def digest(tensor: torch.Tensor) -> str:
    """Digest dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    found.update(bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist()))
    return found.hexdigest()[:24]


def conditioning(seed: int, tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, tokens, 4096, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 768, generator=generator),
    }


def loops(client: Client, model: str, loan: Loan, vae: Loan) -> Results:
    """Results of ``generate``: latents, last preview, image."""
    for name, tokens, height, width, batch, more in (
        ("plain", 16, 128, 128, 1, {}),
        ("odd text and size", 15, 112, 144, 1, {}),
        ("long text", 301, 64, 64, 1, {}),
        ("two images", 16, 128, 64, 2, {}),
        ("given sigmas", 16, 128, 128, 1, {"sigmas": SIGMAS}),
        ("other guidance", 16, 128, 128, 1, {"guidance_scale": 1.5}),
        ("step cache", 16, 128, 128, 1, {"step_cache": 0.4}),
    ):
        given = conditioning(1, tokens, batch)
        job = client.generate(loan, given, vae=vae, height=height, width=width, steps=4, seed=7, previews=True, **more)
        shown = [job.denoised().clone() for _ in job]
        result = job.result()
        yield f"{model}, generate, {name}: latents", result.latents
        yield f"{model}, generate, {name}: last preview", shown[-1]
        if result.image is not None:
            yield f"{model}, generate, {name}: image", result.image


def forwards(client: Client, model: str, loan: Loan) -> Results:
    """Results of ``call``: one row, kept conditioning, two texts of unequal length, a known schedule.

    The names say "denoise", as in older files.
    """
    calls = Flux1Calls(client, loan)
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    short, long = calls.keep(**conditioning(1, 15)), calls.keep(**conditioning(2, 40))
    yield f"{model}, denoise, one", calls.predict(noise[:1], 0.7, short)
    yield f"{model}, denoise, kept", calls.predict(noise[1:], 0.3, short)
    yield f"{model}, denoise, unequal texts", calls.predict(noise, 0.5, [short, long])
    for sigma in SIGMAS:
        yield f"{model}, denoise, schedule told, {sigma}", calls.predict(noise[:1], sigma, long, sigmas=SIGMAS)


def coding(client: Client, vae: Loan) -> Results:
    """Results of decode and encode."""
    latents = torch.randn(1, 16, 14, 18, generator=torch.Generator().manual_seed(6))
    image = client.decode(vae, latents)
    yield "decode", image
    yield "decode, not clamped", client.decode(vae, latents, clamp=False)
    yield "encode", client.encode(vae, image)


def texts(client: Client) -> Results:
    """Results of both text encoders."""
    for name, state, pooled in (
        ("clip_l", text_checkpoints.clip_l_state_dict(4), True),
        ("t5", text_checkpoints.t5_state_dict(5), False),
    ):
        with client.lend(state) as encoder:
            ids = torch.arange(3, 23).reshape(2, 10)
            encoded = client.encode_text(encoder, ids, pooled=pooled)
            yield f"encode_text, {name}", encoded.hidden_states
            if encoded.pooled is not None:
                yield f"encode_text, {name}: pooled", encoded.pooled


def all_results(client: Client, folder: Path) -> Results:
    """Results of all jobs, one component after the other."""
    path = folder / "ae.safetensors"
    checkpoints.write_flux_vae(path, seed=3)
    with client.lend(path) as vae:
        for model, state in (
            ("dev", checkpoints.flux1_state_dict(1)),
            ("schnell", checkpoints.flux1_state_dict(2, guidance=False)),
            ("dev in bfloat16", checkpoints.flux1_state_dict(1, dtype=torch.bfloat16)),
        ):
            with client.lend(state) as loan:
                yield from loops(client, model, loan, vae)
                yield from forwards(client, model, loan)
        yield from coding(client, vae)
    yield from texts(client)


def collect(ranks: int) -> dict[str, str]:
    """Start a daemon with ``ranks`` ranks; returns the digest of each result."""
    with tempfile.TemporaryDirectory(prefix="xditd-digests-") as folder:
        daemon, client = DaemonProcess(Path(folder, "daemon.log"), ranks, "cpu"), None
        try:
            client = daemon.connect()
            daemon.wait_ready(client, lambda _: None)
            return {name: digest(tensor) for name, tensor in all_results(client, Path(folder))}
        finally:
            daemon.stop(client)


def run(given: argparse.Namespace, report: Report) -> int:
    found: dict[str, dict[str, str]] = {}
    for name in [name for name in os.environ if name.startswith("XDITD_")]:
        del os.environ[name]  # settings of the daemon
    for ranks in given.ranks:
        started = time.monotonic()
        found[str(ranks)] = collect(ranks)
        report.add(digests=found)
        print(f"{ranks} rank(s): {len(found[str(ranks)])} results in {time.monotonic() - started:.0f} s", flush=True)
    if given.against is None:
        return 0
    before = json.loads(given.against.read_text())["digests"]
    differing = [
        f"{ranks} rank(s), {name}"
        for ranks, digests in found.items()
        for name in sorted(digests.keys() | before.get(ranks, {}).keys())
        if digests.get(name) != before.get(ranks, {}).get(name)
    ]
    for line in differing:
        print(f"differs: {line}")
    print(f"{sum(map(len, found.values()))} results compared, {len(differing)} differ")
    return 1 if differing else 0
