"""The environment of the worker group: what it may inherit, and what it always gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

INHERITED: Final = frozenset(
    {
        "CC",
        "CUDA_CACHE_PATH",
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "CXX",
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LOGNAME",
        "NCCL_DEBUG",
        "NCCL_DEBUG_SUBSYS",
        "OMP_NUM_THREADS",
        "PATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONPATH",
        "SHELL",
        "TEMP",
        "TMP",
        "TMPDIR",
        "TORCHDYNAMO_VERBOSE",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_LOGS",
        "TRITON_CACHE_DIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    }
)
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
    # A line of the log should arrive when it is written, also from a rank that is about to die.
    "PYTHONUNBUFFERED": "1",
}


def worker_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Choose what the group's leader gets: an allow-list, so that nothing is inherited by accident."""
    chosen = {
        name: value for name, value in inherited.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }
    chosen.update(FIXED)
    return chosen
