"""Time lends and jobs of a daemon whose workers do nothing, and measure its memory afterwards."""

from __future__ import annotations

import hashlib
import json
import os
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

from xditd import __version__
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.arguments import Argument, InIo, Kept, Values
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.job_parts import Part
from xditd.ipc.protocol import PROTOCOL_VERSION, Request
from xditd.ipc.replies import Called, Lent, Queued, StepDone
from xditd.ipc.requests import Call, Hello, Lend
from xditd.ipc.tensors import ComponentKind, Fingerprint, HostShmBlock, Manifest, TensorSpec

TENSORS, LENDS = 1_200, 500
"""Tensors of the lent component, as many as FLUX.1's transformer has, and how often it is lent."""

FAKE_WORKERS_VARIABLE = "BENCHMARK_CHECKOUT"
_CHECKOUT = Path(os.environ.get(FAKE_WORKERS_VARIABLE) or Path(__file__).resolve().parent.parent)
FAKE_WORKERS = _CHECKOUT / "tests" / "integration" / "fake_workers.py"


def hello() -> Request:
    return Hello(
        request_id="1", protocol_version=PROTOCOL_VERSION, package_version=__version__, client_name="benchmark"
    )


@contextmanager
def daemon(worker_command: list[str] | None) -> Iterator[tuple[RuntimeDir, float, int]]:
    """Run a daemon in a runtime folder of its own; yields the folder, the time of its exec, and its pid."""
    folder = Path(tempfile.mkdtemp(prefix="xditd-"))
    config = folder / "xditd.toml"
    config.write_text(f"[workers]\ncommand = {json.dumps(worker_command)}\n" if worker_command else "")
    runtime = RuntimeDir(folder / "run")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
    command = [sys.executable, "-m", "xditd.daemon", "--config", str(config), "--runtime-dir", str(runtime.path)]
    began_s = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environ)
    try:
        yield runtime, began_s, process.pid
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder)


def cpu_s(pid: int) -> float:
    """Return the processor time of all threads of a process in seconds (proc_pid_stat(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_work(jobs: int) -> dict[str, Any]:
    """Time lends and jobs of one client on a worker group that does nothing.

    Each lend has :data:`TENSORS` tensors and a higher generation than the last. ``ms`` is the median time to an answer,
    ``cpu_us`` the daemon's processor time for one request, ``memory_bytes`` the daemon's VmRSS at the end.
    """
    descriptor = os.memfd_create("benchmark")
    os.truncate(descriptor, 4096)
    block = HostShmBlock(
        fd=descriptor,
        inode=os.fstat(descriptor).st_ino,
        size_bytes=4096,
        fingerprint=Fingerprint(length_bytes=0, digest=hashlib.blake2b(b"", digest_size=16).digest()),
    )
    specs = tuple(TensorSpec(f"blocks.{number}.weight", "float32", (4, 4), 0, 0) for number in range(TENSORS))
    arguments: dict[str, Argument] = {  # of a step of FLUX.1, whose conditioning is kept
        "hidden_states": InIo(offset_bytes=0, dtype="bfloat16", shape=(1, 16, 64)),
        "encoder_hidden_states": Kept(kept_id="k1", dtype="bfloat16", shape=(1, 512, 4096)),
        "pooled_projections": Kept(kept_id="k2", dtype="bfloat16", shape=(1, 768)),
        "timestep": Values(dtype="float32", shape=(1,), values=(0.5,)),
        "img_ids": Kept(kept_id="k3", dtype="float32", shape=(16, 3)),
        "txt_ids": Kept(kept_id="k4", dtype="float32", shape=(512, 3)),
        "guidance": Values(dtype="float32", shape=(1,), values=(3.5,)),
    }
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RECONNECT_IVL, 1)
    socket.setsockopt(zmq.LINGER, 0)

    def ask(request: Request) -> Any:
        socket.send(encode(request))
        while isinstance(reply := reply_decoder.decode(socket.recv()), (Queued, StepDone)):
            pass
        return reply

    def lend(number: int) -> Request:
        kind = ComponentKind.TRANSFORMER
        manifest = Manifest(kind=kind, label="benchmark", blocks=(block,), tensors=specs, generation=number)
        return Lend(request_id=f"lend-{number}", manifest=manifest)

    def job(number: int) -> Request:
        return Call(
            request_id=f"job-{number}",
            component_id=component_id,
            io=block,
            parts=(Part(arguments=arguments),),
            out_offset_bytes=2048,
            out_size_bytes=2048,
        )

    with daemon([sys.executable, str(FAKE_WORKERS), "--step-s", "0"]) as (runtime, _, pid):

        def time_all(make: Callable[[int], Request], expected: type, count: int) -> dict[str, float]:
            requests = [make(number) for number in range(1, count + 1)]
            before_s, took_ms = cpu_s(pid), []
            for request in requests:
                began_s = time.perf_counter()
                if not isinstance(ask(request), expected):
                    raise SystemExit(f"{type(request).__name__}: a request of the benchmark failed")
                took_ms.append((time.perf_counter() - began_s) * 1e3)
            return {"ms": statistics.median(took_ms), "cpu_us": (cpu_s(pid) - before_s) / count * 1e6}

        socket.connect(endpoint(runtime.client_socket))
        ask(hello())
        component_id = ask(lend(0)).component_id
        found: dict[str, Any] = {"lend": time_all(lend, Lent, LENDS), "job": time_all(job, Called, jobs)}
        memory = Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()
    socket.close()
    context.term()
    os.close(descriptor)
    return found | {"memory_bytes": float(memory[0]) * 1024}
