"""The environment of the worker group: what it may inherit, and what it always gets."""

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
"""Variables that hold a path or a list of paths: the workers run in another folder than the daemon was started in."""

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
    # Nothing is downloaded, ever: weights come from clients.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DIFFUSERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Process groups meet on loopback: no listener on another interface.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # NVLink multicast belongs to the whole machine, and virtual machines often refuse it; nothing here gains by it.
    "NCCL_NVLS_ENABLE": "0",
    # After an error of NCCL the process ends, and no communicator is tidied up first: that itself may hang, and the
    # daemon rebuilds the whole group anyway. 3 is SkipCleanUp in c10d/ProcessGroupNCCL.hpp, torch's default today.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # One judge of silence: the daemon, which knows how long a step takes. torch's monitor would also abort a rank that
    # was stopped and goes on, or whose machine slept, and end the group for another reason than the log gives.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # No flight recorder, and no dump of it that a broken rank would wait for and leave in /tmp. (torch warns of the
    # recorder's older name, TORCH_NCCL_TRACE_BUFFER_SIZE, in every rank.)
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
    # Lent memory cannot be opened under cudaMallocAsync. torch reads the second name from 2.9 on.
    "PYTORCH_CUDA_ALLOC_CONF": "backend:native",
    "PYTORCH_ALLOC_CONF": "backend:native",
    # Nothing is imported from the folder in which a process runs. Before Python 3.11 this has no effect; the group runs
    # in /, where only root can leave a module.
    "PYTHONSAFEPATH": "1",
    # A line of the log should arrive when it is written, also from a rank that is about to die.
    "PYTHONUNBUFFERED": "1",
}


def worker_environment(inherited: Mapping[str, str], folder: Path | None) -> dict[str, str]:
    """Choose what the group's leader gets: an allow-list, so that nothing is inherited by accident.

    Relative paths in it count from ``folder``, the one in which the daemon was started; without one they are left out.
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
