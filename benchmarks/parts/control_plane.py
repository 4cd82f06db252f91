"""Measure the daemon without workers: start, status requests, lends, jobs, memory.

    python benchmarks/run.py control_plane
    python benchmarks/run.py control_plane --against ../xditd-before     # lends and jobs, beside another checkout

Hello is timed from exec of ``python -m xditd.daemon``, while its worker group starts. Status requests are compared with
a plain pyzmq ROUTER that echoes, measured alternately with the same clients: a few clients that always have several
pending requests, a hundred clients with one pending request each, and the same hundred at a fixed rate. The first two
saturate the server, so their latency is clients / throughput; the third does not. Memory is the daemon's after many
jobs on a worker group that does nothing. Exit status 1 if a limit is missed.

Needs: nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq
from lends_and_jobs import FAKE_WORKERS_VARIABLE, TENSORS, daemon, hello, measure_work
from measuring import Report, part_command, print_table
from status_load import PACED_PER_S, ZmtpClient, load

from xditd.ipc.addresses import endpoint
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.replies import Status, Welcome
from xditd.ipc.requests import GetStatus

BAR_HELLO_S = 0.3
BAR_IMPORT_S = 0.15
BAR_RATIO = 0.5
BAR_P99_MS = 5.0
BAR_MEMORY_BYTES = 60e6
FEW, FEW_WINDOW = 16, 4
MANY, MANY_WINDOW = 100, 1
"""Number of clients, and the pending requests of each."""

IDLE_WORKER = [sys.executable, "-c", "import signal; signal.pause()"]
"""Replaces the worker group where it is not measured, because it would use the cores."""

ECHO = """
import sys, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind(sys.argv[1])
while True:
    socket.send_multipart(socket.recv_multipart())
"""

IMPORT = """
import sys, time
began = time.perf_counter()
import xditd.client
print(time.perf_counter() - began, "torch" in sys.modules)
"""


def compiled_code() -> None:
    """Compile the bytecode that every process uses, as an installed package has it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="xditd-pyc-")
    for module in ("xditd.client", "xditd.daemon.main"):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="daemon starts and imports to take the median of")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to load each server")
    parser.add_argument("--rounds", type=int, default=3, help="alternate runs of echo and status; medians count")
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs before the daemon's memory is measured")
    parser.add_argument("--work", action="store_true", help="time only lends and jobs")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time both, alternately with another checkout")


def run(given: argparse.Namespace, report: Report) -> int:
    compiled_code()
    if given.against is not None:
        compare_checkouts(given.against.resolve(), given.jobs, given.rounds, report)
        return 0
    if given.work:
        found = measure_work(given.jobs)
        report.add(**found)
        print(json.dumps(found))
        return 0
    import_s, has_torch = measure_import(given.repeats)
    report.add(
        hello_idle_group_s=median_and_range([measure_hello(IDLE_WORKER) for _ in range(given.repeats)]),
        hello_real_group_s=median_and_range([measure_hello(None) for _ in range(given.repeats)]),
        import_client_s=median_and_range(import_s),
        import_client_loads_torch=has_torch,
    )
    for name, clients, window in (("few", FEW, FEW_WINDOW), ("many", MANY, MANY_WINDOW), ("paced", MANY, 0)):
        report.add(**{name: compare(clients, window, given.seconds, given.rounds)})
    report.add(**measure_work(given.jobs), jobs=given.jobs)
    shutil.rmtree(os.environ["PYTHONPYCACHEPREFIX"])
    figures = report.found
    print_figures(figures)
    is_met = (
        figures["hello_real_group_s"]["median"] <= BAR_HELLO_S
        and figures["import_client_s"]["median"] <= BAR_IMPORT_S
        and not has_torch
        and all(figures[name]["ratio"] >= BAR_RATIO for name in ("few", "many"))
        and figures["many"]["status"]["p99_ms"] <= BAR_P99_MS
        and figures["memory_bytes"] <= BAR_MEMORY_BYTES
    )
    return 0 if is_met else 1


@contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Run the echo server; yields its socket and its pid."""
    folder = tempfile.mkdtemp(prefix="xditd-")
    path = f"{folder}/echo.sock"
    process = subprocess.Popen([sys.executable, "-c", ECHO, f"ipc://{path}"])
    try:
        yield path, process.pid
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def measure_hello(worker_command: list[str] | None) -> float:
    """Return the seconds from the daemon's exec to its answer to a hello that was sent before it listened."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RECONNECT_IVL, 1)  # the default is 100 ms
    socket.setsockopt(zmq.LINGER, 0)
    with daemon(worker_command) as (runtime, began_s, _):
        socket.connect(endpoint(runtime.client_socket))
        socket.send(encode(hello()))
        if not socket.poll(20_000) or not isinstance(reply_decoder.decode(socket.recv()), Welcome):
            raise SystemExit("the daemon did not answer the benchmark's hello")
        took_s = time.monotonic() - began_s
    socket.close()
    context.term()
    return took_s


def measure_import(times: int) -> tuple[list[float], bool]:
    """Time the import of ``xditd.client`` in new processes; also returns whether any of them imported torch."""
    answers = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(times)
    ]
    return [float(took) for took, _ in answers], any(has_torch == "True" for _, has_torch in answers)


def compare(clients: int, window: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Load the echo server and the daemon alternately, so that other work on the machine slows both.

    ``window`` is the number of pending requests of each client; 0 is for requests at a fixed rate.
    """
    request = encode(GetStatus(request_id="1"))
    echoes, statuses = [], []
    for _ in range(rounds):
        with echo_server() as (path, pid):
            echoes.append(load([ZmtpClient(path) for _ in range(clients)], pid, request, window, seconds, len))
        with daemon(IDLE_WORKER) as (runtime, _, pid):
            path = endpoint(runtime.client_socket).removeprefix("ipc://")
            statuses.append(
                load([connect_client(path) for _ in range(clients)], pid, request, window, seconds, check_status)
            )
    ratios = [status["per_s"] / echo["per_s"] for echo, status in zip(echoes, statuses, strict=True)]
    return {
        "clients": clients,
        "window": window,
        "echo": medians(echoes),
        "status": medians(statuses),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def compare_checkouts(other: Path, jobs: int, rounds: int, report: Report) -> None:
    """Time lends and jobs of this version and of another checkout alternately, and print a table of medians."""
    found: dict[Path, list[dict[str, Any]]] = {Path(__file__).resolve().parents[2]: [], other: []}
    for _ in range(rounds):
        for checkout, runs in found.items():
            environment = os.environ | {"PYTHONPATH": str(checkout / ".pkg"), FAKE_WORKERS_VARIABLE: str(checkout)}
            command = part_command("control_plane", "--work", "--jobs", jobs)
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    this, before = found.values()
    report.add(this=this, other=before)
    rows = [("", "this", "other", "ratio")]
    for work in ("lend", "job"):
        for key, unit in (("ms", "ms until answered"), ("cpu_us", "us of the daemon's CPU")):
            mine, theirs = (statistics.median(run[work][key] for run in runs) for runs in (this, before))
            rows.append((f"{work}, {unit}", f"{mine:.3f}", f"{theirs:.3f}", f"{mine / theirs:.3f}x"))
    print_table("Medians", rows)


def connect_client(path: str) -> ZmtpClient:
    client = ZmtpClient(path)
    if not isinstance(reply_decoder.decode(client.ask(encode(hello()))), Welcome):
        raise SystemExit("the daemon did not answer the benchmark's hello")
    return client


def check_status(answer: bytes) -> None:
    if not isinstance(reply_decoder.decode(answer), Status):
        raise SystemExit("the daemon did not answer with its status")


def median_and_range(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_figures(figures: dict[str, Any]) -> None:
    rows = [("", "median", "min - max", "bar")]
    for key, name, bar in (
        ("hello_idle_group_s", "exec to hello answered, group idle", BAR_HELLO_S),
        ("hello_real_group_s", "exec to hello answered, group importing", BAR_HELLO_S),
        ("import_client_s", "import xditd.client", BAR_IMPORT_S),
    ):
        found = figures[key]
        rows.append((name, f"{found['median']:.3f} s", f"{found['min']:.3f} - {found['max']:.3f} s", f"{bar:.2f} s"))
    rows.append(("torch loaded by that import", "yes" if figures["import_client_loads_torch"] else "no", "", "no"))
    for key in ("few", "many", "paced"):
        found = figures[key]
        title = f"{found['window']} pending each" if found["window"] else f"{PACED_PER_S} requests/s together"
        rows.append((f"{found['clients']} clients, {title}", "", "", ""))
        for server, name in (("echo", "  bare pyzmq ROUTER echo"), ("status", "  xditd status")):
            one = found[server]
            latency = f"p50 {one['median_ms']:.2f}, p99 {one['p99_ms']:.2f} ms, {one['server_cpu_us']:.0f} us CPU"
            bar = f"{BAR_P99_MS:.0f} ms" if (key, server) == ("many", "status") else ""
            rows.append((name, f"{one['per_s']:.0f} /s", latency, bar))
        if not found["window"]:
            continue
        least, most = min(found["ratios"]), max(found["ratios"])
        rows.append(("  status / echo", f"{found['ratio']:.2f}x", f"{least:.2f} - {most:.2f}x", f"{BAR_RATIO}x"))
    for work, name in (("lend", f"lend of {TENSORS} tensors"), ("job", "job")):
        one = figures[work]
        rows.append((f"{name}, one client", f"{one['ms']:.2f} ms", f"{one['cpu_us']:.0f} us CPU", ""))
    memory, bar = f"{figures['memory_bytes'] / 1e6:.1f} MB", f"{BAR_MEMORY_BYTES / 1e6:.0f} MB"
    rows.append((f"daemon's memory after {figures['jobs']} jobs", memory, "", bar))
    print_table("Bars are upper limits, that of status / echo a lower one", rows)
