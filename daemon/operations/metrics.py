"""The daemon's metrics in Prometheus's text format: names, labels, help texts and sources of the values.

A custom collector of ``prometheus_client`` reads the values on each scrape, from the state and the counters that
``xditd status`` shows too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from xditd.daemon.operations.counters import COPY_KINDS, EventCounters, Histogram
from xditd.ipc.status import DaemonStatus, GroupState, JobState, LeaseState
from xditd.ipc.tensors import Tier

Values = Mapping[tuple[str, ...] | str, float]
"""Values by label values; those of a single label are not in a tuple."""


def write_metrics(status: DaemonStatus, counters: EventCounters, group_failures: int) -> str:
    """Return all metrics as text; none of them contains a client's names, labels or paths.

    ``group_failures`` counts the groups in a row that ended without a served job.
    """
    return generate_latest(_Collected(status, counters, group_failures)).decode()


class _Collected(Collector):
    def __init__(self, status: DaemonStatus, counters: EventCounters, group_failures: int) -> None:
        self._status = status
        self._counters = counters
        self._group_failures = group_failures

    def collect(self) -> Iterable[Metric]:
        status = self._status
        versions = (status.package_version, str(status.protocol_version))
        yield _gauge("xditd_info", "Versions of the daemon.", {versions: 1}, "version", "protocol")
        yield _gauge("xditd_uptime_seconds", "Seconds since the daemon started.", status.uptime_s)
        yield from self._group()
        yield from self._workers()
        yield from self._forwards()
        yield from self._jobs()
        yield from self._loans()

    def _group(self) -> Iterator[Metric]:
        status = self._status
        starts = status.counters.group_starts
        yield _gauge(
            "xditd_group_state",
            "1 for the worker group's present state, 0 for the others.",
            {state.value: state is status.group_state for state in GroupState},
            "state",
        )
        yield _counter("xditd_group_starts_total", "Worker groups started.", starts)
        yield _counter("xditd_group_restarts_total", "Worker groups restarted.", max(0, starts - 1))
        yield _gauge(
            "xditd_group_failures_in_a_row",
            "Worker groups in a row that ended without a served job.",
            self._group_failures,
        )

    def _workers(self) -> Iterator[Metric]:
        workers = self._status.workers
        yield _gauge(
            "xditd_gpu_memory_used_bytes",
            "GPU memory in use by all processes, after the rank's last command.",
            {(str(each.rank), each.device, each.device_uuid): each.memory_bytes for each in workers},
            *("rank", "device", "uuid"),
        )
        yield _gauge(
            "xditd_worker_memory_bytes",
            "What a rank holds of its GPU's memory by part, counted while it was idle.",
            {
                (str(each.rank), part): size
                for each in workers
                if each.memory is not None
                for part, size in each.memory.by_part.items()
            },
            *("rank", "part"),
        )
        yield _gauge(
            "xditd_worker_components",
            "Components mapped by a rank.",
            {str(each.rank): each.loaded for each in workers},
            "rank",
        )

    def _forwards(self) -> Iterator[Metric]:
        status, checks = self._status, self._status.fused_checks
        yield _gauge(
            "xditd_fused_error_ratio",
            "Relative error of fused kernels against unmodified modules, by tokens of a forward on a rank; "
            "NaN: not finite.",
            {(each.kernels, each.case): math.nan if each.error is None else each.error for each in checks},
            *("kernels", "tokens"),
        )
        yield _gauge(
            "xditd_fused_tolerance_ratio",
            "Largest relative error with which fused kernels are used.",
            {(each.kernels, each.case): each.tolerance for each in checks},
            *("kernels", "tokens"),
        )
        yield _gauge(
            "xditd_fused_in_use",
            "1 if fused kernels are used, 0 if they were refused and the unmodified modules run.",
            {(each.kernels, each.case): each.is_used for each in checks},
            *("kernels", "tokens"),
        )
        yield _gauge(
            "xditd_forward_paths",
            "Kinds of forwards of modules by the path they take, of the newest decisions.",
            {paths: float(count) for paths, count in sorted(_forward_paths(status).items())},
            *("class", "path"),
        )
        yield _counter(
            "xditd_packed_products_total",
            "Products of packed weights on rank 0, dequantised (reference) or in eight bits (native).",
            {
                (each.format, way): count
                for each in status.packed_products
                for way, count in (("reference", each.reference), ("native", each.native))
            },
            *("format", "way"),
        )
        yield _counter("xditd_lora_jobs_total", "Jobs with LoRAs.", status.loras.jobs)
        yield _counter("xditd_lora_forwards_total", "Forwards with LoRAs on rank 0.", status.loras.forwards)
        yield _counter(
            "xditd_lora_captured_forwards_total",
            "Forwards with LoRAs on rank 0 that were CUDA graphs.",
            status.loras.launched,
        )
        yield _counter(
            "xditd_outside_connections_total",
            "Connections to other hosts that workers attempted; must be 0.",
            status.counters.outside_connections,
        )

    def _jobs(self) -> Iterator[Metric]:
        status, counters = self._status, self._counters
        states = Counter(job.state for job in status.jobs)
        yield _gauge("xditd_clients", "Open sessions.", status.clients)
        yield _gauge("xditd_queue_length", "Jobs that wait.", states[JobState.QUEUED])
        yield _gauge("xditd_queue_limit", "Jobs that may wait.", status.queue_limit)
        yield _gauge(
            "xditd_jobs",
            "Jobs that wait or run, by state.",
            {each.value: states[each] for each in (JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING)},
            "state",
        )
        yield _counter(
            "xditd_jobs_total",
            "Jobs that ended, by operation and outcome.",
            dict(sorted(counters.jobs.items())),
            *("op", "outcome"),
        )
        yield _histogram("xditd_job_wait_seconds", "Time that jobs waited in the queue.", _by_op(counters.waited), "op")
        yield _histogram(
            "xditd_job_duration_seconds",
            "Time that jobs ran, of those that succeeded.",
            _by_op(counters.ran),
            "op",
        )
        yield _histogram("xditd_step_seconds", "Time of a denoising step, from rank 0.", {(): counters.steps})
        yield _counter(
            "xditd_errors_total",
            "Failed jobs and lost worker groups, by error code.",
            dict(sorted(counters.errors.items())),
            "code",
        )

    def _loans(self) -> Iterator[Metric]:
        status, counters = self._status, self._counters
        states = Counter(each.state for each in status.components)
        yield _gauge(
            "xditd_leases",
            "Leases of lent components, by state.",
            {state.value: states[state] for state in LeaseState if state is not LeaseState.ENDED},
            "state",
        )
        yield _gauge(
            "xditd_lent_bytes",
            "Bytes of tensors that are lent now, by tier.",
            {tier.value: status.lent_bytes.get(tier.value, 0) for tier in Tier},
            "tier",
        )
        yield _counter(
            "xditd_lent_bytes_total",
            "Bytes of tensors lent so far, by tier, without repeated lends of the same bytes.",
            {tier.value: counters.lent_bytes[tier.value] for tier in Tier},
            "tier",
        )
        yield _counter(
            "xditd_copied_bytes_total",
            "Bytes that clients and workers copied to lend, by kind.",
            {kind: counters.copied_bytes[kind] for kind in COPY_KINDS},
            "kind",
        )


def _forward_paths(status: DaemonStatus) -> Counter[tuple[str, ...]]:
    """Count the cases by class and path: the last decision on each case."""
    last = {(each.class_name, each.split, each.shapes): each.path for each in status.forward_paths}
    return Counter((class_name, path) for (class_name, _, _), path in last.items())


def _gauge(name: str, help: str, values: Values | float, *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(name, help, labels=labels), values)


def _counter(name: str, help: str, values: Values | float, *labels: str) -> Metric:
    return _filled(CounterMetricFamily(name, help, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values | float) -> Metric:
    if not isinstance(values, Mapping):
        values = {(): values}
    for labels, value in values.items():
        family.add_metric((labels,) if isinstance(labels, str) else labels, value)
    return family


def _histogram(name: str, help: str, found: Mapping[tuple[str, ...], Histogram], *labels: str) -> Metric:
    family = HistogramMetricFamily(name, help, labels=labels)
    for values, histogram in sorted(found.items()):
        family.add_metric(values, histogram.cumulative(), histogram.sum)
    return family


def _by_op(histograms: Mapping[str, Histogram]) -> dict[tuple[str, ...], Histogram]:
    return {(op,): histogram for op, histogram in histograms.items()}
