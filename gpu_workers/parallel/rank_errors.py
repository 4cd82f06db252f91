"""Recognise errors of torch and gloo: out of memory, and the end of a peer rank."""

from __future__ import annotations

import torch

from xditd.ipc.errors import OutOfMemory


def out_of_memory(error: BaseException) -> OutOfMemory:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return OutOfMemory(
        f"no room on the worker's device: {first_line}; use a smaller size or batch, or free memory there"
    )


def is_host_out_of_memory(error: Exception) -> bool:
    """Return whether the host is out of memory; torch's allocator for CPUs has no error class of its own.

    Source: c10/core/impl/alloc_cpu.cpp, "DefaultCPUAllocator: can't allocate memory".
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def is_peer_rank_failure(error: Exception) -> bool:
    """Return whether a collective failed because another rank ended; gloo has no error class for that.

    Source: gloo/transport/tcp/pair.cc, "Connection closed by peer"; a reset happens if data was on its way.
    """
    if isinstance(error, torch.distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(
        mark in str(error) for mark in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )
