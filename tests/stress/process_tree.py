"""Read other processes from /proc: parents, children, descriptors, memory."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie; a stopped one counts as running."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_s(pid: int) -> float:
    """Return the processor time of all threads of a process in seconds; its resolution is 10 ms."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> set[int]:
    """Return all live descendants of ``pid``."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and is_running(int(name)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(name)] = parent_of(int(name))
    found: set[int] = set()
    grown = {pid}
    while grown:
        found |= grown
        grown = {child for child, parent in parents.items() if parent in found} - found
    return found - {pid}


def count_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memfds(pid: int) -> set[str]:
    """Return the inodes of the memfds that a process has mapped."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        return {line.split()[4] for line in maps if "/memfd:" in line}


def shared_memory() -> set[str]:
    """Return the files of /dev/shm that no process has mapped: what another program uses meanwhile is none of ours.

    Source: proc(5), /proc/pid/maps.
    """
    names = set(os.listdir("/dev/shm"))
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            names -= set(re.findall(r"/dev/shm/(\S+)", maps.read_text())) if names else set()
    return {name for name in names if os.path.isfile(f"/dev/shm/{name}")}  # no segment is a folder


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return a field of ``/proc/PID/status``: ``VmRSS``, ``VmHWM`` (its peak) or ``RssAnon`` (without mapped files)."""
    found = Path(f"/proc/{pid}/status").read_text().partition(f"{field}:")[2].split()
    if not found:
        raise ProcessLookupError(f"process {pid}: has no {field}; it has ended")
    return int(found[0]) * 1024
