"""``GetStatus``: a snapshot of the daemon's whole state."""

from __future__ import annotations

import os
import time
from typing import Final, get_args

from xditd import __version__
from xditd.daemon.front.service import Service
from xditd.daemon.groups.worker_group import WorkerGroup
from xditd.daemon.queue.jobs import op_of
from xditd.ipc import limits
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.requests import AnyRequest, InferenceRequest
from xditd.ipc.status import Counters, DaemonStatus, LoraCounts, WorkerStatus
from xditd.ipc.worker_messages import RankTally

_INFERENCE_OPS: Final = frozenset(op_of(each) for each in get_args(AnyRequest) if issubclass(each, InferenceRequest))
"""The operations that ``jobs_done``, ``jobs_failed`` and ``jobs_cancelled`` count: not lends or memory checks."""


def describe_daemon(service: Service) -> DaemonStatus:
    """Collect the daemon's state."""
    group, ranks = service.group, service.group.ranks
    first = ranks.first if ranks is not None else None
    leases = list(service.lending.leases)
    lent_bytes: dict[str, int] = {}
    for lease in leases:
        for tier, count in lease.bytes_by_tier.items():
            lent_bytes[tier] = lent_bytes.get(tier, 0) + count
    return DaemonStatus(
        package_version=__version__,
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        uptime_s=time.monotonic() - service.started_s,
        runtime_dir=str(service.configuration.runtime.path),
        group_state=group.state,
        group_detail=group.detail[: limits.MAX_TEXT_CHARS],
        device_kind=first.device_kind if first else "",
        world_size=group.expected_world_size,
        parallel=first.parallel if first else {},
        layout=first.layout if first else None,
        attention_backend=first.attention_backend if first else "",
        precision=first.precision if first else "",
        fused_checks=ranks.fused_checks if ranks is not None else (),
        split_checks=tuple(ranks.split_checks) if ranks is not None else (),
        forward_paths=tuple(ranks.forward_paths) if ranks is not None else (),
        packed_products=ranks.packed_products if ranks is not None else (),
        loras=ranks.loras if ranks is not None else LoraCounts(),
        workers=_workers(group),
        components=tuple([lease.status() for lease in leases]),
        jobs=tuple([job.status() for job in service.scheduler]),
        queue_limit=service.scheduler.queue.limit,
        clients=len(service.sessions),
        counters=_counters(service),
        lent_bytes=lent_bytes,
        last_errors=service.counters.last_errors(),
        last_job_ms=service.scheduler.last_job_ms,
    )


def _workers(group: WorkerGroup) -> tuple[WorkerStatus, ...]:
    if group.ranks is None:
        return ()
    tallies = group.ranks.tallies
    return tuple(
        WorkerStatus(
            rank=rank,
            pid=ready.pid,
            device=ready.device,
            device_uuid=ready.device_uuid,
            memory_bytes=tallies[rank].memory_bytes if rank in tallies else 0,
            loaded=tallies[rank].loaded if rank in tallies else 0,
            memory=group.ranks.memory.get(rank),
        )
        for rank, ready in sorted(group.ranks.ready.items())
    )


def _counters(service: Service) -> Counters:
    """Models are counted on rank 0, since all ranks build the same; outside connections are summed over the ranks."""
    group, outcomes = service.group, service.counters.outcomes(_INFERENCE_OPS)
    first = group.ranks.tallies.get(0, RankTally()) if group.ranks is not None else RankTally()
    return Counters(
        group_starts=group.starts,
        jobs_done=outcomes["done"],
        jobs_failed=outcomes["failed"],
        jobs_cancelled=outcomes["cancelled"],
        models_built=first.models_built,
        models_reused=first.models_reused,
        plugs=first.plugs,
        outside_connections=group.outside_connections,
    )
