"""What all models of a process share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
    from xditd.gpu_workers.parallel.peer_exchange import PeerExchange


@dataclass(frozen=True, eq=False)
class ProcessResources:
    """The compiled graphs of a process, made when they are first needed, and the memory in which GPUs write to each
    other's. Both are ``None`` in a process that has none."""

    graphs: Callable[[], CompiledGraphs] | None = None
    peers: PeerExchange | None = None
