"""Describe the machine of a benchmark: processor, GPUs, versions, GPU memory in use."""

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
    """Return the processor, the GPUs with their driver, and the versions of the packages."""
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
    """Return the bytes of GPU memory of each process, by pid, CUDA contexts included."""
    rows = (row.split(", ") for row in _query("pid,used_memory", "--query-compute-apps"))
    return {int(pid): int(used.split()[0]) * 2**20 for pid, used in rows}


def gpu_memory_used() -> list[int]:
    """Bytes in use on each GPU, by every process."""
    return [int(used.split()[0]) * 2**20 for used in _query("memory.used", "--query-gpu")]


def temporary_folder(size_bytes: int) -> Path:
    """Return a folder for temporary files of ``size_bytes``: /dev/shm if they fit, else the system's."""
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
