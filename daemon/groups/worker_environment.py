"""Environment variables of the worker processes: which are inherited, and which are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from xditd.ipc.inherited import search_path

PATHS: Final = frozenset(
    {
        "CUDA_CACHE_PATH",
        "CUDA_HOME",
        "HOME",
        "LD_LIBRARY_PATH",
        "PATH",
        "PYTHONPATH",
        "TEMP",
        "TMP",
        "TMPDIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "VIRTUAL_ENV",
    }
)
"""Variables with a path or a list of paths. They are made absolute: the workers run in another folder."""

INHERITED: Final = PATHS | {
    "CC",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "LANG",
    "LANGUAGE",
    "LOGNAME",
    "NCCL_DEBUG",
    "NCCL_DEBUG_SUBSYS",
    "PYTHONDONTWRITEBYTECODE",
    "SHELL",
    "TORCHDYNAMO_VERBOSE",
    "TORCH_LOGS",
    "TZ",
    "USER",
}
INHERITED_PREFIXES: Final = ("LC_", "NVIDIA_", "XDG_")

FIXED: Final[Mapping[str, str]] = {
    # Nothing is downloaded: weights come from clients.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DIFFUSERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Process groups connect over loopback only.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # NVLink multicast is a resource of the whole machine, virtual machines often refuse it, and it gains nothing here.
    "NCCL_NVLS_ENABLE": "0",
    # After an NCCL error the process ends without destroying communicators: that may hang, and the daemon rebuilds the
    # whole group anyway. 3 is SkipCleanUp in c10d/ProcessGroupNCCL.hpp, torch's default today.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # Only the daemon decides that a rank hangs, since it knows how long a step takes. torch's monitor would also abort
    # a rank that was stopped and continued, or whose machine slept, and the log would name another cause.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # No flight recorder: a broken rank would wait for its dump and leave it in /tmp. (torch warns of its older name,
    # TORCH_NCCL_TRACE_BUFFER_SIZE, in every rank.)
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
    # Ranks load what a process of its own compiles (models/compiled_graphs.py), and need no processes for that. torch
    # reads this once, when its compiler is imported.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    # CUDA IPC does not work with cudaMallocAsync. torch reads the second name from 2.9 on.
    "PYTORCH_CUDA_ALLOC_CONF": "backend:native",
    "PYTORCH_ALLOC_CONF": "backend:native",
    # No imports from the current folder. Before Python 3.11 this has no effect, but the workers run in /, where only
    # root can write.
    "PYTHONSAFEPATH": "1",
    # Log lines arrive at once, also from a rank that is about to end.
    "PYTHONUNBUFFERED": "1",
}


def worker_environment(inherited: Mapping[str, str], folder: Path | None) -> dict[str, str]:
    """Build the leader's environment from an allow-list and :data:`FIXED`.

    Relative paths are resolved against ``folder``, in which the daemon was started; without it they are left out.
    """
    chosen = {
        name: value for name, value in inherited.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }
    for name in PATHS:
        settled = search_path(chosen.pop(name, ""), folder)
        if settled:
            chosen[name] = settled
    chosen.update(FIXED)
    return chosen
