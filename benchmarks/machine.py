"""What a benchmark ran on: printed beside every figure."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import xditd

PACKAGES = ("torch", "xfuser", "diffusers", "pyzmq", "msgpack", "msgspec", "cuda-bindings")


@functools.cache
def describe_machine() -> dict[str, Any]:
    """Name the processor, the GPUs with their driver, and the versions of what matters."""
    versions = {"xditd": xditd.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "gpus": _query("name,driver_version", "--query-gpu"),
        "python": platform.python_version(),
        "versions": versions,
    }


def gpu_memory_by_process() -> dict[int, int]:
    """Bytes that each process holds on the GPUs, contexts included, as the driver counts them."""
    rows = (row.split(", ") for row in _query("pid,used_memory", "--query-compute-apps"))
    return {int(pid): int(used.split()[0]) * 2**20 for pid, used in rows}


def gpu_memory_used() -> list[int]:
    """Bytes in use on each GPU, by every process."""
    return [int(used.split()[0]) * 2**20 for used in _query("memory.used", "--query-gpu")]


def roomy_folder(size_bytes: int) -> Path:
    """Choose where files of so many bytes lie for a while: memory is the faster disk, where it has room for them."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free >= size_bytes:
        return shared
    return Path(tempfile.gettempdir())


def _query(fields: str, what: str) -> list[str]:
    try:
        found = subprocess.run(
            ["nvidia-smi", f"{what}={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [line for line in found.stdout.splitlines() if line]


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return names[0] if names else platform.machine()
