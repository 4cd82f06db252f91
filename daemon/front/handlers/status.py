"""``GetStatus``: the daemon's state, complete, at one moment."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Final

import msgspec

from xditd import __version__
from xditd.daemon.front.service import Service
from xditd.daemon.groups.worker_group import Supervisor
from xditd.daemon.sockets.sessions import Session
from xditd.ipc import limits
from xditd.ipc.protocol import PROTOCOL_VERSION, Reply
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import Counters, DaemonStatus, WorkerStatus
from xditd.ipc.worker_messages import RankTally

_encoder: Final = msgspec.msgpack.Encoder()


class EncodedStatus(Reply, tag="status", frozen=True, kw_only=True):
    """A :class:`~xditd.ipc.replies.Status` whose state is encoded already: only the request's id is still to add."""

    daemon: msgspec.Raw


def report(service: Service, _: Session, request: GetStatus) -> EncodedStatus:
    """Answer with the state, which is gathered and encoded once for all that ask before it can change."""
    if service.snapshot is None:
        service.snapshot = msgspec.Raw(_encoder.encode(_gather(service)))
    return EncodedStatus(request_id=request.request_id, daemon=service.snapshot)


def _gather(service: Service) -> DaemonStatus:
    supervisor = service.supervisor
    ranks = supervisor.group.ranks if supervisor.group is not None else {}
    first = ranks[min(ranks)] if ranks else None
    queue = service.desk.queue
    return DaemonStatus(
        package_version=__version__,
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        uptime_s=time.monotonic() - service.started_s,
        runtime_dir=str(service.configuration.runtime.path),
        group_state=supervisor.state,
        group_detail=supervisor.detail[: limits.MAX_TEXT_CHARS],
        device_kind=first.device_kind if first else "",
        world_size=supervisor.expected_world_size,
        parallel=first.parallel if first else {},
        layout=first.layout if first else None,
        attention_backend=first.attention_backend if first else "",
        precision=first.precision if first else "",
        fused_checks=supervisor.group.fused_checks if supervisor.group is not None else (),
        workers=report_workers(supervisor),
        components=tuple(lease.status() for lease in service.loans.registry),
        jobs=tuple(job.status() for job in queue),
        queue_limit=queue.limit,
        clients=len(service.sessions),
        counters=report_counters(service),
        lent_bytes=_lent_bytes(service),
        last_errors=service.accounts.last_errors(),
        last_job_ms=service.desk.last_job_ms,
    )


def _lent_bytes(service: Service) -> dict[str, int]:
    found: Counter[str] = Counter()
    for lease in service.loans.registry:
        found.update(lease.bytes_by_tier)
    return dict(found)


def report_workers(supervisor: Supervisor) -> tuple[WorkerStatus, ...]:
    group = supervisor.group
    if group is None:
        return ()
    found: list[WorkerStatus] = []
    for rank, ready in sorted(group.ranks.items()):
        tally = group.tallies.get(rank, RankTally())
        found.append(
            WorkerStatus(
                rank=rank,
                pid=ready.pid,
                device=ready.device,
                device_uuid=ready.device_uuid,
                memory_bytes=tally.memory_bytes,
                loaded=tally.loaded,
            )
        )
    return tuple(found)


def report_counters(service: Service) -> Counters:
    """Skeletons are counted by rank 0, whose work all ranks repeat; connections to other hosts by any of them."""
    tallies = service.supervisor.group.tallies if service.supervisor.group is not None else {}
    first = tallies.get(0, RankTally())
    desk = service.desk
    return Counters(
        group_starts=service.supervisor.starts,
        jobs_done=desk.jobs_done,
        jobs_failed=desk.jobs_failed,
        jobs_cancelled=desk.jobs_cancelled,
        skeletons_built=first.skeletons_built,
        skeletons_reused=first.skeletons_reused,
        plugs=first.plugs,
        outside_connections=service.supervisor.outside_connections_before
        + sum(tally.outside_connections for tally in tallies.values()),
    )
