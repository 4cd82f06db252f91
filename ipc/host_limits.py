"""What limits this process: memory, and processes with threads, by its resource limits and its control groups.

Native code does not say which limit it met: torch ends a process by SIGABRT where it cannot start a thread, and the
kernel ends one by SIGKILL where its control group has no memory left.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MOUNTS: Final = Path("/sys/fs/cgroup")
_GROUPS: Final = Path("/proc/self/cgroup")
_GIB: Final = 2**30
_UNLIMITED: Final = 2**60
"""Control groups of version 1 have a number near 2**63 where there is no limit."""


def describe_memory() -> str:
    """Name the limits on this process's memory; ``""`` if there are none."""
    found = []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found.append(f"{soft / _GIB:.2f} GiB of addresses for a process (RLIMIT_AS)")
    of_group = _smallest("memory", ("memory.max", "memory.limit_in_bytes"))
    if of_group is not None:
        found.append(f"{of_group / _GIB:.2f} GiB for its control group (memory.max)")
    return " and ".join(found)


def describe_tasks() -> str:
    """Name the limits on processes and threads, and on the room for their stacks; ``""`` if there are none."""
    found = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        found.append(f"{soft} for the user (RLIMIT_NPROC)")
    of_group = _smallest("pids", ("pids.max",))
    if of_group is not None:
        found.append(f"{of_group} for its control group (pids.max)")
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:  # each thread has a stack, 8 MiB as a rule
        found.append(f"{addresses / _GIB:.2f} GiB of addresses (RLIMIT_AS)")
    return " and ".join(found)


def count_memory_kills() -> int:
    """Return how many processes of this control group the kernel has ended for want of memory; 0 if it does not say.

    Source: Control Group v2, memory.events; version 1, memory.oom_control.
    """
    for name in ("memory.events", "memory.oom_control"):
        for path in _files("memory", name):
            with contextlib.suppress(OSError, ValueError):
                counts = dict(line.split() for line in path.read_text().splitlines())
                return int(counts.get("oom_kill", 0))
    return 0


def explain_kill(kills_before: int) -> str:
    """Say whether memory ran out since ``kills_before`` was counted, after which a process was ended; ``""`` if not."""
    if count_memory_kills() <= kills_before:
        return ""
    return without_memory("the kernel has ended processes of this control group since the start")


def without_threads(why: str) -> str:
    """Say that no process or thread can be started, with the limits and the remedy."""
    return (
        f"no process or thread can be started: {why}{_with_limits(describe_tasks())}; "
        "raise the limit (ulimit -u, TasksMax= of the service, --pids-limit of the container)"
    )


def without_memory(why: str) -> str:
    """Say that host memory ran out, with the limits and the remedy."""
    return (
        f"out of host memory: {why}{_with_limits(describe_memory())}; "
        "free some, or raise the limit (ulimit -v, MemoryMax= of the service, --memory of the container)"
    )


def _with_limits(limits: str) -> str:
    return f"; allowed are {limits}" if limits else ""


def _smallest(controller: str, names: tuple[str, ...]) -> int | None:
    """Return the smallest limit of the process's control group and those above it."""
    found = []
    for name in names:
        for path in _files(controller, name):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                found.append(int(path.read_text()))
    return min((limit for limit in found if limit < _UNLIMITED), default=None)


def _files(controller: str, name: str) -> Iterator[Path]:
    """Return the files of that name of this process's control group and of those above it. Source: cgroups(7)."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        roots = (_MOUNTS / controller,) if controller in controllers.split(",") else ()
        for root in roots or ((_MOUNTS, _MOUNTS / "unified") if not controllers else ()):
            folder = root / group.lstrip("/")
            for each in (folder, *folder.parents):
                if (each / name).is_file():
                    yield each / name
                if each == root:
                    break
