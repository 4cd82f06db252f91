"""What the driver says that this process holds of a GPU, its context and libraries included."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from typing import Any, Final

logger = logging.getLogger(__name__)

_LIBRARY: Final = "libnvidia-ml.so.1"
_SUCCESS: Final = 0
_INSUFFICIENT_SIZE: Final = 7
_NOT_AVAILABLE: Final = 2**64 - 1
_ROOM: Final = 16
"""Processes more than were counted, since others may start in between."""


class _ProcessInfo(ctypes.Structure):
    """``nvmlProcessInfo_v2_t``."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def held_bytes(device_uuid: str) -> int | None:
    """Return the bytes of a GPU, by its UUID, that this process holds, without mapped memory of other processes.

    ``None`` if the driver does not say: without NVML, or in a container that numbers processes by itself.

    Source: NVML API Reference, "nvmlDeviceGetComputeRunningProcesses", "nvmlProcessInfo_t".
    """
    library = _open()
    if library is None:
        return None
    device = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByUUID(device_uuid.encode(), ctypes.byref(device)) != _SUCCESS:
        return None
    count = ctypes.c_uint(0)
    if library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), None) not in (
        _SUCCESS,
        _INSUFFICIENT_SIZE,
    ):
        return None
    count.value += _ROOM
    found = (_ProcessInfo * count.value)()
    if library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), found) != _SUCCESS:
        return None
    own = [each.used_bytes for each in found[: count.value] if each.pid == os.getpid()]
    return None if not own or _NOT_AVAILABLE in own else sum(own)


@cache
def _open() -> Any:
    """Load and start NVML once; ``None`` if it is not there, or is too old."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.nvmlDeviceGetComputeRunningProcesses_v3  # noqa: B018  # looks the name up
        status = library.nvmlInit_v2()
    except (OSError, AttributeError) as error:
        logger.debug("the driver does not say what this process holds: %s", error)
        return None
    return library if status == _SUCCESS else None
