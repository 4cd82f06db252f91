"""Time jobs through the router of a cluster beside the same jobs of a client of the daemon itself.

    python benchmarks/run.py cluster --json FILE
    python benchmarks/run.py cluster --jobs 100

One host on loopback with one worker on the CPU, a tiny FLUX.1, one step: jobs alternate between the two ways. Prints
the median of both and the median of the differences of neighbours, whose limit is 10 ms; a miss exits with 1.

Needs: ray
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import Report, print_table, skip

from xditd.client import Client
from xditd.client.demo import checkpoints
from xditd.client.demo.daemon_process import DaemonProcess

LIMIT_MS = 10.0
SIDE = 64
JOIN_DEADLINE_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=60, help="timed, by each way")
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt: what crosses is 16 KiB for each")


def run(given: argparse.Namespace, report: Report) -> int:
    if importlib.util.find_spec("ray") is None:
        skip("cluster: ray is not installed; pip install 'xditd[cluster]'")
    with tempfile.TemporaryDirectory(prefix="xdcl") as text:
        folder = Path(text)
        transformer = folder / "models" / "flux1.safetensors"
        transformer.parent.mkdir()
        checkpoints.write_flux1(transformer, seed=1)
        daemon = DaemonProcess(folder / "daemon.log", 1, "cpu")
        joined: subprocess.Popen[bytes] | None = None
        client = None
        try:
            client = daemon.connect()
            daemon.wait_ready(client, lambda _: None)
            address = f"127.0.0.1:{free_port()}"
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            joined = join(address, folder, daemon)
            direct_ms, routed_ms = measure(client, address, transformer, given)
        finally:
            if joined is not None:
                import ray

                ray.shutdown()  # Ray ends a process whose cluster is gone
                joined.terminate()
                joined.wait()
            daemon.stop(client)
            if client is not None:
                client.close()
    more_ms = statistics.median(routed - direct for direct, routed in zip(direct_ms, routed_ms, strict=True))
    direct, routed = statistics.median(direct_ms), statistics.median(routed_ms)
    report.add(direct_ms=direct, routed_ms=routed, more_ms=more_ms, limit_ms=LIMIT_MS, jobs=given.jobs)
    rows = [("", "median"), ("direct", f"{direct:.2f} ms"), ("through the router", f"{routed:.2f} ms")]
    print_table(f"The router adds at most {LIMIT_MS:.0f} ms", [*rows, ("more", f"{more_ms:.2f} ms")])
    return int(more_ms > LIMIT_MS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(address: str, folder: Path, daemon: DaemonProcess) -> subprocess.Popen[bytes]:
    xditd = str(Path(sys.executable).with_name("xditd"))
    command = [xditd, "cluster", "join", "--head", "--address", address, "--name", "a", "--accept-remote-code"]
    command += ["--search-path", str(folder / "models"), "--runtime-dir", str(daemon.runtime_dir)]
    command += ["--ray-temp-dir", str(folder / "ray")]
    with (folder / "join.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def measure(
    client: Client, address: str, transformer: Path, given: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each direct job and of each routed one."""
    from xditd.client.cluster.client import ClusterClient
    from xditd.client.cluster.errors import ClusterUnreachable

    ends_s = time.monotonic() + JOIN_DEADLINE_S
    while True:
        try:
            cluster = ClusterClient(address)
            break
        except ClusterUnreachable:
            if time.monotonic() > ends_s:
                raise
            time.sleep(1)  # Ray is starting
    while not any(getattr(each, "files", None) for each in cluster.hosts().values()):
        time.sleep(0.2)  # the agent hashes its files
    generator = torch.Generator().manual_seed(0)
    conditioning = {
        "prompt_embeds": torch.randn(1, given.tokens, 4096, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
    }
    content = cluster.content_of(transformer)
    more = {"height": SIDE, "width": SIDE, "steps": 1, "seed": 1}
    first = cluster.generate(content, conditioning, **more).result()
    (component,) = (each.component_id for each in client.status().components)

    def direct() -> torch.Tensor:
        return client.generate(component, conditioning, **more).result().latents

    def routed() -> torch.Tensor:
        return cluster.generate(content, conditioning, **more).result().latents

    if not torch.equal(first.latents, direct()):
        raise SystemExit("the two ways give different bits")
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(given.jobs + 3):
        for found, way in zip(times, (direct, routed), strict=True):
            began_s = time.perf_counter()
            way()
            if number >= 3:
                found.append(1e3 * (time.perf_counter() - began_s))
    return times
