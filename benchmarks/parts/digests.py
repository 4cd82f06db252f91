"""Digests of what every kind of job gives on the CPU, so that two versions can be compared bit by bit.

    python benchmarks/digests.py --json before.json                 # with the version to compare with
    python benchmarks/digests.py --against before.json              # with the other one, on the same machine

Starts the real daemon with one rank and with two, lends small seeded checkpoints, and runs jobs of each kind: sizes and
texts that divide and that do not, batches, given sigmas, previews, a step cache, kept conditioning of several texts,
images both ways, text encoders. Bits depend on the processor and on torch: compare on one machine alone. Exit status 1
where any digest differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe_machine

sys.path.append(str(Path(__file__).parents[1] / "tests/checkpoints"))

import text_checkpoints

from xditd.client import Client, Loan
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Flux1Calls
from xditd.ipc.errors import DaemonUnreachable
from xditd.ipc.status import GroupState

Results = Iterator[tuple[str, torch.Tensor]]
READY_DEADLINE_S = 150.0
SIGMAS = (1.0, 0.7, 0.35, 0.1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the digests here")
    parser.add_argument("--against", type=Path, help="compare with what --json wrote before")
    return parser


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
    """``generate``: what it gives, what it shows on the way, and what it takes."""
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
    """``call``: alone, with conditioning that is kept, and with two texts of unequal length.

    The names are those of records from before there was ``call``.
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
    """Images from latents and back."""
    latents = torch.randn(1, 16, 14, 18, generator=torch.Generator().manual_seed(6))
    image = client.decode(vae, latents)
    yield "decode", image
    yield "decode, not clamped", client.decode(vae, latents, clamp=False)
    yield "encode", client.encode(vae, image)


def texts(client: Client) -> Results:
    """Both text encoders."""
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


def everything(client: Client, folder: Path) -> Results:
    """Every job, one component at a time."""
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


def connect(runtime: Path, daemon: subprocess.Popen[bytes]) -> Client:
    """Wait until the daemon answers and its workers are ready."""
    ends = time.monotonic() + READY_DEADLINE_S
    while daemon.poll() is None and time.monotonic() < ends:
        try:
            client = Client(runtime, name="digests")
        except DaemonUnreachable:
            time.sleep(0.05)  # between two looks
            continue
        while time.monotonic() < ends:
            if client.status().group_state is GroupState.READY:
                return client
            time.sleep(0.1)  # between two looks
        client.close()
    sys.exit(f"no workers after {READY_DEADLINE_S:.0f} s; the daemon's status is {daemon.poll()}")


def collect(ranks: int) -> dict[str, str]:
    """Start a daemon with so many ranks and take the digest of each result."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDITD_")}
    with tempfile.TemporaryDirectory(prefix="xditd-digests-") as folder:
        runtime = Path(folder) / "run"
        command = [sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(runtime), "--log-level", "warning"]
        daemon = subprocess.Popen([*command, "--workers", str(ranks), "--device", "cpu"], env=environment)
        try:
            with connect(runtime, daemon) as client:
                return {name: digest(tensor) for name, tensor in everything(client, Path(folder))}
        finally:
            daemon.terminate()
            daemon.wait(timeout=60)


def main() -> None:
    given = build_parser().parse_args()
    found: dict[str, dict[str, str]] = {}
    for ranks in given.ranks:
        started = time.monotonic()
        found[str(ranks)] = collect(ranks)
        print(f"{ranks} rank(s): {len(found[str(ranks)])} results in {time.monotonic() - started:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": describe_machine(), "digests": found}, indent=1) + "\n")
    if given.against is None:
        return
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
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
