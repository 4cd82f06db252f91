"""The memory of an idle rank: counted by part, and what torch keeps for later jobs given back after a while."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import torch

from xditd.gpu_workers.models.components import Components
from xditd.gpu_workers.parallel import peer_memory
from xditd.gpu_workers.process import driver_memory
from xditd.ipc.status import MemoryParts

logger = logging.getLogger(__name__)

COUNT_AFTER_S: Final = 1.0
"""From the last command to the first count: counting takes milliseconds, which the next command would wait for."""

TRIM_AFTER_S: Final = 10.0
"""From the last command until torch gives back what it keeps. A job soon after another finds its memory as it was; one
that comes later allocates it again, which takes some 20 ms."""


class IdleMemory:
    """Counts a rank's memory twice in each idle time: after :data:`COUNT_AFTER_S`, and once it has been trimmed.

    Trimming frees no memory that anything uses: weights, graphs and their memory stay. ``dropped`` says how many models
    were dropped so far, which may be garbage that no collection visits: a ready rank's imports freeze all objects.
    """

    def __init__(
        self,
        device: torch.device,
        count: Callable[[], MemoryParts],
        dropped: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._count = count
        self._dropped = dropped
        self._freed_models = dropped()
        self._clock = clock
        self._found: MemoryParts | None = None
        self.note_command()

    @property
    def wait_s(self) -> float | None:
        """How long to wait for a command before the next :meth:`run_due`; ``None`` if nothing is left to do."""
        return max(0.0, self._idle_since_s + self._due[0] - self._clock()) if self._due else None

    def note_command(self) -> None:
        """Begin again: a command was handled."""
        self._idle_since_s = self._clock()
        self._due = deque((COUNT_AFTER_S, TRIM_AFTER_S))

    def run_due(self) -> None:
        """Count, or trim and count, if it is time."""
        if not self._due or self.wait_s:
            return
        if self._due.popleft() == TRIM_AFTER_S:
            self._free_dropped()
            self._trim()
        self._found = self._count()

    def _free_dropped(self) -> None:
        """Free models that were dropped. It visits every object of the process, so it is done for them alone."""
        dropped = self._dropped()
        if dropped == self._freed_models:
            return
        began_s = time.perf_counter()
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        took_s = time.perf_counter() - began_s
        logger.info("idle: dropped models were freed models=%d took_s=%.2f", dropped - self._freed_models, took_s)
        self._freed_models = dropped

    def _trim(self) -> None:
        if self._device.type != "cuda":
            return
        before_bytes = torch.cuda.memory_reserved(self._device)
        torch.cuda.empty_cache()
        freed_bytes = before_bytes - torch.cuda.memory_reserved(self._device)
        if freed_bytes:
            logger.info("idle: memory kept for jobs was given back mib=%d", freed_bytes / 2**20)

    def take(self) -> MemoryParts | None:
        """Return a new count, once."""
        found, self._found = self._found, None
        return found


def count_parts(device: torch.device, device_uuid: str, components: Components) -> MemoryParts:
    """Count what this rank holds on its GPU; on the CPU, what it holds for components."""
    weights, scratch = components.weights_bytes, components.packed.scratch.size_bytes
    if device.type != "cuda":
        return MemoryParts(weights_bytes=weights, scratch_bytes=scratch)
    graphs = reserved = allocated = 0
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != device.index:
            continue
        if tuple(segment["segment_pool_id"]) != (0, 0):
            graphs += segment["total_size"]
        else:
            reserved += segment["total_size"]
            allocated += segment["allocated_size"]
    exchange = peer_memory.total_bytes()
    held = driver_memory.held_bytes(device_uuid)
    return MemoryParts(
        weights_bytes=weights,
        scratch_bytes=scratch,
        graphs_bytes=graphs,
        exchange_bytes=exchange,
        tensors_bytes=max(0, allocated - weights - scratch),
        reserve_bytes=reserved - allocated,
        context_bytes=None if held is None else max(0, held - reserved - graphs - exchange),
    )
