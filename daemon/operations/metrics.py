"""The daemon's metrics: what each is called, and where its value comes from."""

from __future__ import annotations

import math
import time
from collections import Counter

from xditd import __version__
from xditd.daemon.front.handlers.status import report_counters, report_workers
from xditd.daemon.front.service import Service
from xditd.daemon.operations.counters import COPY_KINDS
from xditd.daemon.operations.exposition import Exposition
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.status import FusedCheck, GroupState, JobState, LeaseState
from xditd.ipc.tensors import Tier


def write_metrics(service: Service) -> str:
    """Write every metric in Prometheus's text format. Names, labels and paths of clients stay out of it."""
    text = Exposition()
    text.gauge(
        "xditd_info",
        "Versions of the daemon.",
        ({"version": __version__, "protocol": PROTOCOL_VERSION}, 1),
    )
    text.gauge("xditd_uptime_seconds", "Since the daemon started.", ({}, time.monotonic() - service.started_s))
    _write_group(text, service)
    _write_jobs(text, service)
    _write_loans(text, service)
    return text.render()


def _write_group(text: Exposition, service: Service) -> None:
    supervisor, counters = service.supervisor, report_counters(service)
    text.gauge(
        "xditd_group_state",
        "1 for the state that the worker group is in.",
        *(({"state": state.value}, state is supervisor.state) for state in GroupState),
    )
    text.counter("xditd_group_starts_total", "Worker groups started.", ({}, supervisor.starts))
    text.counter("xditd_group_restarts_total", "Worker groups rebuilt.", ({}, max(0, supervisor.starts - 1)))
    text.gauge(
        "xditd_group_failures_in_a_row", "Groups that ended without a served job.", ({}, supervisor.restarts.failures)
    )
    workers = report_workers(supervisor)
    text.gauge(
        "xditd_gpu_memory_used_bytes",
        "In use on the whole GPU, by every process, after the rank's last command.",
        *(({"rank": w.rank, "device": w.device, "uuid": w.device_uuid}, w.memory_bytes) for w in workers),
    )
    text.gauge(
        "xditd_worker_components", "Components mapped by a rank.", *(({"rank": w.rank}, w.loaded) for w in workers)
    )
    checks = supervisor.group.fused_checks if supervisor.group is not None else ()
    text.gauge(
        "xditd_fused_error_ratio",
        "Relative error of fused kernels against plain modules, by the tokens of a forward on a rank; NaN: not finite.",
        *((_of(each), math.nan if each.error is None else each.error) for each in checks),
    )
    text.gauge(
        "xditd_fused_tolerance_ratio",
        "The error up to which fused kernels are used.",
        *((_of(each), each.tolerance) for each in checks),
    )
    text.gauge(
        "xditd_fused_in_use",
        "1 where fused kernels are used, 0 where they were refused and plain modules run.",
        *((_of(each), each.is_used) for each in checks),
    )
    text.counter(
        "xditd_outside_connections_total",
        "Connections to other hosts that workers attempted; has to be 0.",
        ({}, counters.outside_connections),
    )


def _of(check: FusedCheck) -> dict[str, str]:
    return {"kernels": check.kernels, "tokens": check.case}


def _write_jobs(text: Exposition, service: Service) -> None:
    queue, accounts = service.desk.queue, service.accounts
    states = Counter(job.state for job in queue)
    text.gauge("xditd_clients", "Open sessions.", ({}, len(service.sessions)))
    text.gauge("xditd_queue_length", "Requests that wait.", ({}, states[JobState.QUEUED]))
    text.gauge("xditd_queue_limit", "Requests that may wait.", ({}, queue.limit))
    text.gauge(
        "xditd_jobs",
        "Requests at the workers' desk, by state.",
        *(
            ({"state": state.value}, states[state])
            for state in (JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING)
        ),
    )
    text.counter(
        "xditd_jobs_total",
        "Requests that needed the workers, by operation and outcome.",
        *(({"op": op, "outcome": outcome}, count) for (op, outcome), count in sorted(accounts.jobs.items())),
    )
    text.histogram(
        "xditd_job_wait_seconds",
        "From arrival to the turn.",
        *(({"op": op}, found) for op, found in sorted(accounts.waited.items())),
    )
    text.histogram(
        "xditd_job_duration_seconds",
        "From the turn to the result, of requests that were served.",
        *(({"op": op}, found) for op, found in sorted(accounts.ran.items())),
    )
    text.histogram("xditd_step_seconds", "One denoising step, as rank 0 reports it.", ({}, accounts.steps))
    text.counter(
        "xditd_errors_total",
        "Failed requests and lost worker groups, by error code.",
        *(({"code": code}, count) for code, count in sorted(accounts.errors.items())),
    )


def _write_loans(text: Exposition, service: Service) -> None:
    leases, accounts = list(service.loans.registry), service.accounts
    states = Counter(lease.state for lease in leases)
    on_loan: Counter[str] = Counter()
    for lease in leases:
        on_loan.update(lease.bytes_by_tier)
    text.gauge(
        "xditd_leases",
        "Components on loan, by state.",
        *(({"state": state.value}, states[state]) for state in LeaseState if state is not LeaseState.ENDED),
    )
    text.gauge(
        "xditd_lent_bytes",
        "Bytes of tensors on loan now, by tier.",
        *(({"tier": tier.value}, on_loan[tier.value]) for tier in Tier),
    )
    text.counter(
        "xditd_lent_bytes_total",
        "Bytes of tensors lent, by tier, repetitions aside.",
        *(({"tier": tier.value}, accounts.lent_bytes[tier.value]) for tier in Tier),
    )
    text.counter(
        "xditd_copied_bytes_total",
        "Bytes that client and workers copied to serve lends, by kind.",
        *(({"kind": kind}, accounts.copied_bytes[kind]) for kind in COPY_KINDS),
    )
