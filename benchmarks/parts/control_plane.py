"""How fast the daemon starts and answers, without any worker's help.

    python benchmarks/control_plane.py
    python benchmarks/control_plane.py --json
    python benchmarks/control_plane.py --against ../xditd-before     # lends and jobs, in turns with another checkout

Hello is timed from exec of ``python -m xditd.daemon`` while its worker group starts beside it. Status requests are
compared with a bare pyzmq ROUTER that echoes, measured in the same run with the same clients, in turns: a few clients
that always have several requests under way, a hundred that ask again as soon as they have their answer, and the same
hundred at a stated rate. The first two load the server all it can take, so there a latency is clients by throughput;
the third tells what one of a hundred waits at a server with time to spare. Memory is what the daemon holds after many
jobs on a worker group that does nothing. Clients are plain sockets in one process (``zmtp_client.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq
from lends_and_jobs import FAKE_WORKERS_VARIABLE, TENSORS, measure_work
from machine import describe_machine
from measured_daemon import cpu_s, daemon, hello
from zmtp_client import ZmtpClient, framed

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
"""Clients, and the requests that each of them has under way."""

PACED_PER_S = 5_000
"""Requests that the hundred clients send together, in turns, whether or not the earlier ones are answered."""

IDLE_WORKER = [sys.executable, "-c", "import signal; signal.pause()"]
"""In place of the worker group where it is not what is measured: it would take the cores from what is."""

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
    """Have every process run from compiled bytecode, as an installed package does."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="xditd-pyc-")
    for module in ("xditd.client", "xditd.daemon.__main__"):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=7, help="daemon starts and imports to take the median of")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to load each server")
    parser.add_argument("--rounds", type=int, default=3, help="turns of echo and status to take the medians of")
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs before the daemon's memory is looked at")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--work", action="store_true", help="time lends and jobs alone")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time them in turns with another version's")
    options = parser.parse_args()
    compiled_code()
    if options.against is not None:
        print(compare_checkouts(options.against.resolve(), options.jobs, options.rounds))
        return 0
    if options.work:
        print(json.dumps(measure_work(options.jobs)))
        return 0
    import_s, has_torch = measure_import(options.starts)
    figures: dict[str, Any] = {
        "machine": describe_machine(),
        "hello_idle_group_s": spread([measure_hello(IDLE_WORKER) for _ in range(options.starts)]),
        "hello_real_group_s": spread([measure_hello(None) for _ in range(options.starts)]),
        "import_client_s": spread(import_s),
        "import_client_loads_torch": has_torch,
    }
    for name, clients, window in (("few", FEW, FEW_WINDOW), ("many", MANY, MANY_WINDOW)):
        figures[name] = compare(clients, window, options.seconds, options.rounds)
    figures["paced"] = compare(MANY, 0, options.seconds, options.rounds)
    figures |= measure_work(options.jobs)
    figures["jobs"] = options.jobs
    shutil.rmtree(os.environ["PYTHONPYCACHEPREFIX"])
    print(json.dumps(figures, indent=2) if options.json else table(figures))
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
    """Run the echo; yields its address and its pid."""
    folder = tempfile.mkdtemp(prefix="xditd-")
    address = f"ipc://{folder}/echo.sock"
    process = subprocess.Popen([sys.executable, "-c", ECHO, address])
    try:
        yield address, process.pid
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def measure_hello(worker_command: list[str] | None) -> float:
    """Seconds from exec until the answer to a hello that waited in the socket's place."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RECONNECT_IVL, 1)  # else ZeroMQ looks for the socket only every 100 ms
    socket.setsockopt(zmq.LINGER, 0)
    with daemon(worker_command) as (runtime, began_s, _):
        socket.connect(endpoint(runtime.client_socket))
        socket.send(encode(hello()))
        if not socket.poll(20_000) or not isinstance(reply_decoder.decode(socket.recv()), Welcome):
            raise SystemExit("the daemon did not welcome the benchmark")
        took_s = time.monotonic() - began_s
    socket.close()
    context.term()
    return took_s


def measure_import(times: int) -> tuple[list[float], bool]:
    """Import ``xditd.client`` in fresh processes; also whether any of them loaded torch."""
    answers = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(times)
    ]
    return [float(took) for took, _ in answers], any(has_torch == "True" for _, has_torch in answers)


def compare(clients: int, window: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Load the echo and the daemon in turns; other work on the machine then meets both. A window of 0: at a pace."""
    request = encode(GetStatus(request_id="1"))
    echoes, statuses = [], []
    for _ in range(rounds):
        with echo_server() as (address, pid):
            echoes.append(load(address, pid, request, clients, window, seconds, None))
        with daemon(IDLE_WORKER) as (runtime, _, pid):
            address = endpoint(runtime.client_socket)
            statuses.append(load(address, pid, request, clients, window, seconds, encode(hello())))
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


def load(
    address: str, pid: int, payload: bytes, clients: int, window: int, seconds: float, greeting: bytes | None
) -> dict[str, float]:
    """Keep ``clients`` connections busy, each with a window of requests, and time what comes back."""
    connections = []
    for _ in range(clients):
        connection = ZmtpClient(address.removeprefix("ipc://"))
        connections.append(connection)
        if greeting is not None and not isinstance(reply_decoder.decode(connection.ask(greeting)), Welcome):
            raise SystemExit("the daemon did not welcome the benchmark")
    used_s, own_s = cpu_s(pid), time.process_time()
    check = check_status if greeting is not None else None
    if window:
        latencies_ms = exchange(connections, payload, window, seconds, check)
    else:
        latencies_ms = exchange_paced(connections, payload, PACED_PER_S, seconds, check)
    used_s, own_s = cpu_s(pid) - used_s, time.process_time() - own_s
    for connection in connections:
        connection.close()
    ordered = sorted(latencies_ms)
    return {
        "per_s": len(ordered) / seconds,
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "server_cpu_us": used_s / len(ordered) * 1e6,
        "client_cpu_us": own_s / len(ordered) * 1e6,
    }


def exchange(
    connections: list[ZmtpClient],
    payload: bytes,
    window: int,
    seconds: float,
    check: Callable[[bytes], None] | None,
) -> list[float]:
    """Send again whatever is answered, at once: as many requests are under way at any time as there can be."""
    frame = framed(payload)
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    latencies_ms: list[float] = []
    with select.epoll() as epoll:
        for descriptor, connection in by_descriptor.items():
            epoll.register(descriptor, select.EPOLLIN)
            for _ in range(window):
                connection.send(frame)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for descriptor, _ in epoll.poll(1.0):
                connection = by_descriptor[descriptor]
                for answer in connection.receive():
                    latencies_ms.append((time.perf_counter() - connection.sent_s.pop(0)) * 1000)
                    if check is not None and len(latencies_ms) % 1_000 == 1:
                        check(answer)
                    connection.send(frame)
    return latencies_ms


def exchange_paced(
    connections: list[ZmtpClient],
    payload: bytes,
    per_s: float,
    seconds: float,
    check: Callable[[bytes], None] | None,
) -> list[float]:
    """Send at a steady rate. A request counts from when it was due, so that one that is sent late is not flattered."""
    frame = framed(payload)
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    latencies_ms: list[float] = []
    due = 0
    began = time.perf_counter()
    with select.epoll() as epoll:
        for descriptor in by_descriptor:
            epoll.register(descriptor, select.EPOLLIN)
        while (now := time.perf_counter() - began) < seconds:
            while due / per_s <= now:
                connection = connections[due % len(connections)]
                connection.send(frame, began + due / per_s)
                due += 1
            for descriptor, _ in epoll.poll(max(0.0, due / per_s - (time.perf_counter() - began))):
                connection = by_descriptor[descriptor]
                for answer in connection.receive():
                    latencies_ms.append((time.perf_counter() - connection.sent_s.pop(0)) * 1000)
                    if check is not None and len(latencies_ms) % 1_000 == 1:
                        check(answer)
    return latencies_ms


def compare_checkouts(other: Path, jobs: int, rounds: int) -> str:
    """Time lends and jobs of this version and of another checkout in turns, and return a table of medians."""
    own = Path(__file__).resolve().parent.parent
    found: dict[Path, list[dict[str, Any]]] = {own: [], other: []}
    for _ in range(rounds):
        for checkout, runs in found.items():
            environment = os.environ | {"PYTHONPATH": str(checkout / ".pkg"), FAKE_WORKERS_VARIABLE: str(checkout)}
            command = [sys.executable, __file__, "--work", "--jobs", str(jobs)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
    lines = [f"{'':<34} {'this':>10} {'other':>10} {'ratio':>8}"]
    for work in ("lend", "job"):
        for key, unit in (("ms", "ms until answered"), ("cpu_us", "us of the daemon's CPU")):
            mine, theirs = (statistics.median(run[work][key] for run in found[which]) for which in (own, other))
            lines.append(f"{work}, {unit:<28} {mine:>10.3f} {theirs:>10.3f} {mine / theirs:>7.3f}x")
    return "\n".join(lines)


def check_status(answer: bytes) -> None:
    if not isinstance(reply_decoder.decode(answer), Status):
        raise SystemExit("the daemon answered something else than its status")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(figures: dict[str, Any]) -> str:
    machine = figures["machine"]
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
        title = f"{found['window']} under way each" if found["window"] else f"{PACED_PER_S} requests/s together"
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
    lines = [f"{name:<40} {value:>12}  {more:<38} {bar:>7}".rstrip() for name, value, more, bar in rows]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join([f"{machine['cpu']}, Python {machine['python']}", versions, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
