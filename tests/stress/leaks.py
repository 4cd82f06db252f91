"""Find leaks: compare the resources of a daemon and its workers before and after, while nothing is lent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from process_tree import count_fds, descendants, memfds, memory_bytes

SPARE_FDS = 2
"""The interpreter may have a file open for a moment."""
DAEMON_GROWTH_BYTES = 16 * 2**20
WORKER_GROWTH_BYTES = 256 * 2**20
"""Anonymous memory. A worker that has run every kind of job once has caches that a new one lacks."""
SLOPE_BYTES_PER_MINUTE = 2**20
SLOPE_MINUTES = 10
"""In shorter runs the interpreter still warms up, so only total growth is checked."""


@dataclass(frozen=True)
class ResourceCounts:
    """Open resources at one moment. ``segments`` are memfds that the daemon's child processes have mapped."""

    daemon_fds: int
    daemon_bytes: int
    processes: int
    worker_fds: int
    segments: int
    largest_worker_bytes: int


def count_resources(pid: int) -> ResourceCounts:
    """Count the resources of a daemon and all its descendants.

    Raises:
        ProcessLookupError, FileNotFoundError: one of them ended meanwhile.
    """
    below = descendants(pid)
    return ResourceCounts(
        daemon_fds=count_fds(pid),
        daemon_bytes=memory_bytes(pid),
        processes=len(below),
        worker_fds=sum(map(count_fds, below)),
        segments=sum(len(memfds(child)) for child in below),
        largest_worker_bytes=max((memory_bytes(child, "RssAnon") for child in below), default=0),
    )


def find_leaks(before: ResourceCounts, after: ResourceCounts, listeners_lost: int = 0) -> list[str]:
    """Name each resource that grew, and missing processes.

    ``listeners_lost`` counts the daemon's sockets whose paths were removed: the daemon makes each again and keeps the
    old listener, because ZeroMQ would end its connections.
    """
    found = []
    if after.daemon_fds > before.daemon_fds + SPARE_FDS + listeners_lost:
        found.append(f"daemon descriptors: {before.daemon_fds} before, {after.daemon_fds} after")
    if after.processes != before.processes:
        found.append(f"processes below the daemon: {before.processes} before, {after.processes} after")
    if after.worker_fds > before.worker_fds + SPARE_FDS * before.processes:
        found.append(f"workers' descriptors: {before.worker_fds} before, {after.worker_fds} after")
    if after.segments > before.segments:
        found.append(f"mapped segments of shared memory: {before.segments} before, {after.segments} after")
    if after.daemon_bytes > before.daemon_bytes + DAEMON_GROWTH_BYTES:
        found.append(f"daemon memory: {mib(before.daemon_bytes)} MiB before, {mib(after.daemon_bytes)} MiB after")
    if after.largest_worker_bytes > before.largest_worker_bytes + WORKER_GROWTH_BYTES:
        grown = mib(before.largest_worker_bytes), mib(after.largest_worker_bytes)
        found.append(f"largest worker's memory: {grown[0]} MiB before, {grown[1]} MiB after")
    return found


def find_slope(samples: Sequence[tuple[float, int]], minutes: float) -> list[str]:
    """Name a steady growth of the daemon's memory; ``samples`` are seconds and bytes."""
    slope = slope_bytes_per_minute(samples)
    if minutes < SLOPE_MINUTES or slope <= SLOPE_BYTES_PER_MINUTE:
        return []
    return [f"daemon memory grows by {slope / 1024:.0f} KiB a minute, at most {SLOPE_BYTES_PER_MINUTE // 1024}"]


def slope_bytes_per_minute(samples: Sequence[tuple[float, int]]) -> float:
    """Return the least-squares slope of the second half, when everything has been loaded once."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    mean_t = sum(t for t, _ in half) / len(half)
    mean_y = sum(y for _, y in half) / len(half)
    spread = sum((t - mean_t) ** 2 for t, _ in half)
    return 60 * sum((t - mean_t) * (y - mean_y) for t, y in half) / spread


def files_left_in(folder: str | os.PathLike[str], allowed: frozenset[str]) -> list[str]:
    """Name files that an ended daemon left in its runtime folder, except ``allowed``."""
    try:
        return sorted(set(os.listdir(folder)) - allowed)
    except FileNotFoundError:
        return []


def mib(size_bytes: int) -> float:
    return round(size_bytes / 2**20, 1)
